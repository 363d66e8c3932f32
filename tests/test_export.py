"""`python -m lit_ft.export`: any checkpoint of a run as a Hugging Face folder."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lit_ft.export import main
from lit_ft.run.files import read_summary
from tests.support.commands import TINY
from tests.support.ollama import prompt_of, read_modelfile
from tests.support.running import run_job
from tests.support.stopping import at


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Run a job whose best weights are not its last ones."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    high = ["optim=sgd", "schedule=constant", "optim.lr=3", "trainer.gradient_clip_val=0"]
    run_job(folder, *TINY, *high, "trainer.max_steps=4", "trainer.val_check_interval=1")
    return folder


@pytest.fixture
def run_dir(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def exported(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def assert_equals_checkpoint(model, path):
    saved = torch.load(path, weights_only=True)["state_dict"]
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, saved[f"model.{name}"].to(weight.dtype)), name


@pytest.mark.parametrize("name", ["last", "best"])
def test_a_named_checkpoint_is_exported(run_dir, tmp_path, capsys, name):
    main([str(run_dir), "--checkpoint", name, "--output", str(tmp_path / "out")])
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "out")
    assert_equals_checkpoint(exported(tmp_path / "out"), run_dir / f"checkpoints/{name}.ckpt")
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())


def test_the_export_of_a_run_is_the_one_of_its_last_checkpoint_byte_for_byte(run_dir, tmp_path):
    """A run exports the model in memory, and reads no checkpoint for it."""
    main([str(run_dir), "--output", str(tmp_path / "out")])
    names = {file.name for file in (run_dir / "export").iterdir()}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    for name in names - {"README.md"}:  # the card names the last validation, which comes later
        assert (tmp_path / "out" / name).read_bytes() == (run_dir / "export" / name).read_bytes()
    assert "model.safetensors" in names


def test_the_two_checkpoints_differ(run_dir):
    best, last = (
        torch.load(run_dir / f"checkpoints/{name}.ckpt", weights_only=True)["state_dict"]
        for name in ("best", "last")
    )
    assert any(not torch.equal(best[name], last[name]) for name in last)


def test_a_checkpoint_is_named_by_its_path_and_the_dtype_is_chosen(run_dir, tmp_path):
    path = run_dir / "checkpoints" / "best.ckpt"
    main([str(run_dir), "--checkpoint", str(path), "--dtype", "bfloat16"])
    model = exported(run_dir / "export")
    assert model.dtype == torch.bfloat16
    assert_equals_checkpoint(model, path)


@pytest.mark.parametrize("optim", ["galore_subspace", "adamw"])
def test_a_run_that_was_stopped_before_its_export_is_exported(tmp_path, optim):
    run_dir, choice = tmp_path / "run", f"optim={optim}"
    with pytest.raises(SystemExit):
        run_job(run_dir, *TINY, choice, "trainer.max_steps=4", *at("on_train_batch_start", 1))
    assert not (run_dir / "export").exists()
    main([str(run_dir)])
    assert_equals_checkpoint(exported(run_dir / "export"), run_dir / "checkpoints/last.ckpt")


def test_an_adapter_is_merged_or_written_alone(tmp_path):
    run_dir = tmp_path / "run"
    # Random weights are new in each process: seeded here as train.py does.
    run_job(run_dir, *TINY, "adapter=lora", "optim.lr=1e-2", "trainer.max_steps=2")
    main([str(run_dir), "--adapter-only", "--output", str(tmp_path / "adapter")])
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    main([str(run_dir), "--output", str(tmp_path / "merged")])
    ours, theirs = exported(tmp_path / "merged"), exported(run_dir / "export")
    for name, weight in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], weight, rtol=0, atol=1e-6)


def test_an_adapter_alone_goes_beside_the_merged_model_not_into_it(tmp_path):
    run_job(tmp_path / "run", *TINY, "adapter=lora", "trainer.max_steps=1")
    merged = exported(tmp_path / "run" / "export").state_dict()
    main([str(tmp_path / "run"), "--adapter-only"])
    assert (tmp_path / "run" / "export" / "adapter" / "adapter_model.safetensors").is_file()
    for name, weight in exported(tmp_path / "run" / "export").state_dict().items():
        assert torch.equal(weight, merged[name])


def test_an_adapter_that_a_run_does_not_have_is_refused_and_nothing_is_written(run_dir, tmp_path):
    with pytest.raises(SystemExit, match="has trained no adapter: leave out --adapter-only"):
        main([str(run_dir), "--adapter-only", "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_modelfile_lets_ollama_chat_as_the_export_does(run_dir, tmp_path, capsys):
    main([str(run_dir), "--ollama", "--output", str(tmp_path / "out")])
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    modelfile = read_modelfile((tmp_path / "out" / "Modelfile").read_text(encoding="utf-8"))
    assert modelfile.model == "."
    assert modelfile.system in tokenizer.chat_template and modelfile.system
    for system in ([], [{"role": "system", "content": "S"}]):
        chat = [*system, {"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
        chat.append({"role": "user", "content": "3"})
        own = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        assert prompt_of(modelfile, chat) == own
    ends = GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    assert {tokenizer.convert_tokens_to_ids(stop) for stop in modelfile.stops} == {*ends}
    with pytest.raises(SystemExit):
        main([str(run_dir), "--ollama", "--adapter-only"])
    assert "--ollama needs the whole model" in capsys.readouterr().err


def test_a_template_that_ollama_cannot_say_leaves_the_model_without_a_modelfile(
    run_dir, tmp_path, capsys
):
    template = tmp_path / "numbered.jinja"
    template.write_text("{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}")
    summary = json.loads((run_dir / "summary.json").read_text())
    summary["config"]["data"]["chat_template"] = str(template)
    del summary["checksum"]
    (run_dir / "summary.json").write_text(json.dumps(summary))
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match=f"The model is in {out}, without a Modelfile: the chat"):
        main([str(run_dir), "--ollama", "--output", str(out)])
    assert exported(out) and not (out / "Modelfile").exists()


def test_what_a_run_gave_its_tokenizer_and_its_precision_come_along(tmp_path):
    settings = ["data.chat_template=plain", "trainer.precision=bf16-true"]
    run_job(tmp_path / "run", *TINY, *settings, "trainer.max_steps=1")
    main([str(tmp_path / "run"), "--output", str(tmp_path / "again")])
    for name in ("chat_template.jinja", "config.json"):
        own, again = (tmp_path / folder / name for folder in ("run/export", "again"))
        assert own.read_text() == again.read_text(), name


def test_what_is_no_run_or_has_no_such_checkpoint_is_named(run_dir, tmp_path):
    with pytest.raises(SystemExit, match="elsewhere is not the folder of a run"):
        main([str(tmp_path / "elsewhere")])
    with pytest.raises(SystemExit, match="has no checkpoint 'first': it has best, last"):
        main([str(run_dir), "--checkpoint", "first"])
    with pytest.raises(SystemExit, match="bfloat17"):
        main([str(run_dir), "--dtype", "bfloat17"])


def test_a_damaged_checkpoint_is_not_exported(run_dir):
    path = run_dir / "checkpoints" / "best.ckpt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(SystemExit, match="best.ckpt is damaged.*checksum.*--checkpoint.*last"):
        main([str(run_dir), "--checkpoint", "best"])
    assert not (run_dir / "out").exists()


def changed(run_dir, change):
    summary = read_summary(run_dir)  # without its checksum, which a file need not have
    change(summary["config"])
    (run_dir / "summary.json").write_text(json.dumps(summary))


def test_a_run_does_not_say_itself_what_is_trusted(run_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("MARKER", str(tmp_path / "marker"))

    def hostile(config):
        config["trusted_packages"] = ["tests", "os"]
        config["module"]["loss"] = {"_target_": "tests.support.marker.Marker"}

    changed(run_dir, hostile)
    with pytest.raises(SystemExit, match=r"tests\.support.*--trusted-packages tests"):
        main([str(run_dir)])
    assert not (tmp_path / "marker").exists()
    main([str(run_dir), "--trusted-packages", "tests"])
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("where", ["model", "loss", "groups"])
def test_a_run_cannot_have_its_configuration_filled_in(run_dir, tmp_path, monkeypatch, where):
    monkeypatch.setenv("MARKER", str(tmp_path / "marker"))
    target = "${oc.create:{_target_:tests.support.marker.Marker}}"
    changed(run_dir, lambda config: config["module"].update({where: target}))
    with pytest.raises(SystemExit, match=rf"config\.module\.{where}=.*Write the value itself"):
        main([str(run_dir)])
    assert not (tmp_path / "marker").exists()


def test_a_run_that_ran_remote_code_asks_for_trust_again(run_dir):
    def remote(config):
        config["module"]["model"] = {
            "_target_": "lit_ft.models.Pretrained",
            "name_or_path": "somebody/something",
            "trust_remote_code": True,
        }

    changed(run_dir, remote)
    with pytest.raises(SystemExit, match=r"trust_remote_code=true.*add --trust-remote-code"):
        main([str(run_dir)])


def test_a_run_from_before_classes_moved_is_exported(run_dir, tmp_path):
    summary = read_summary(run_dir)
    loss = summary["config"]["module"]["loss"]
    assert loss["_target_"] == "lit_ft.loss.ChunkedCrossEntropy"
    loss["_target_"] = "lit_ft.losses.ChunkedCrossEntropy"  # as runs of 0.1 have it
    summary["config"]["trainer"]["strategy"] = {"_target_": "lit_ft.parallel.FSDP2Strategy"}
    (run_dir / "summary.json").write_text(json.dumps(summary))
    main([str(run_dir), "--output", str(tmp_path / "out")])
    assert_equals_checkpoint(exported(tmp_path / "out"), run_dir / "checkpoints/last.ckpt")
