"""The one rule of what a secret is, and the references that Hydra gets in place of secrets."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from lit_ft.run.arguments import composed, for_hydra
from lit_ft.run.hidden import with_secrets, without_secrets
from lit_ft.run.redaction import is_secret, redacted, redacted_text
from tests.support.running import CONF

RANDOM = "9f86d081884c7d659a2feaa0c55ad015"
SECRETS = {
    "logger.api_key": "x1",
    "hub.token": "hf_abc",
    "hub_token": "abc",
    "apiKey": "abc",
    "db.password": 123456,
    "credentials.user": "me",
    "x.AUTH_TOKEN": "abc",
    "x.key": RANDOM,
    "x.auth": RANDOM,
    "note": "AKIAIOSFODNN7EXAMPLE",
    "text": "take hf_AbCdEfGhIjKlMnOpQrSt now",
    "other": "sk-proj-abcdefgh12345678",
    "mirror": "https://me:Pass@word@host/simple",
    "clone": f"https://{RANDOM}@host/a.git",
    "link": "https://host/a?x=1&access_token=abc",
}
PLAIN = {
    "tokenizer": "org/name",
    "max_tokens": 512,
    "key_of": "messages",
    "key": "text",
    "pad_token": "<|endoftext|>",
    "eos_token": "</s>",
    "image_token": "<image>",
    "tokens_per_second": 3.5,
    "token": None,
    "use_auth_token": True,
    "password": "",
    "api_key": "${oc.env:SERVICE_KEY}",
    "credentials._target_": "some.Class",
    "sort_key": "a-long-name-of-a-column",
    "path": "https://host:8080/a@b?page=1",
    "package": "hf_transfer, sk-learn",
    "command": "git@github.com:a/b.git",
}


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_is_redacted(name: str) -> None:
    assert is_secret(name, SECRETS[name])
    value = redacted(SECRETS[name], name)
    assert "***" in value
    assert not [part for part in ("abc", RANDOM, "Pass", "word", "EXAMPLE") if part in value]


@pytest.mark.parametrize("name", PLAIN)
def test_what_only_sounds_like_a_secret_stays(name: str) -> None:
    assert not is_secret(name, PLAIN[name])
    assert redacted(PLAIN[name], name) == PLAIN[name]


def test_texts_lose_what_the_environment_names_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "in-the-environment")
    monkeypatch.setenv("SERVICE_KEY", RANDOM)
    monkeypatch.setenv("LIT_FT_SECRET_X", "abcdef")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false-or-true")
    monkeypatch.setenv("MY_SECRETS", str(Path.cwd()))
    text = f"in-the-environment, x{RANDOM}y, abcdef, abcdefghi false-or-true {Path.cwd()}"
    left = f"***, x***y, ***, abcdefghi false-or-true {Path.cwd()}"
    assert redacted_text(text) == left


def test_no_choice_of_the_project_holds_what_counts_as_a_secret() -> None:
    for file in sorted(CONF.rglob("*.yaml")):
        config = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        assert redacted(config) == config, file


@pytest.mark.parametrize(
    ("argument", "name"),
    [
        ("+a.token=hf_abc", "a.token"),
        ("++a.password=it's (odd", "a.password"),
        ("+a.api_key=k=ey,", "a.api_key"),
        (f"+a.b={RANDOM}", None),
        ("data.path=https://me:pass@host/x?y=1", "data.path"),
        ("+a.options={proxy: 'http://me:pass@host', n: 1}", "a.options.proxy"),
        ("hydra.job.env_set.SERVICE_TOKEN=abc", None),
        ("model.tokenizer=abc", None),
        ("-cn=https://me:pass@host", None),
    ],
)
def test_hydra_gets_a_reference_in_place_of_a_secret(
    argument: str, name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    [hidden] = without_secrets([argument])
    if name is None:
        assert hidden == argument
        return
    variable = "LIT_FT_SECRET_" + name.replace(".", "__").upper()
    assert f"${{oc.env:{variable}}}" in hidden
    assert os.environ[variable] in argument
    assert not is_secret("", hidden.partition("=")[2])


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        (r"+a.b={token: 'it\'s-one', n: 1, c: [null, 'x, y']}", "it's-one"),
        (r'+a.b={token: "say \"it\"", n: 1, c: [null, "x, y"]}', 'say "it"'),
        (r"+a.b={token: one\,two\ three, n: 1, c: [null, x\, y]}", "one,two three"),
        (r"+a.b={token: 'back\\', n: 1, c: [null, 'x, y']}", "back\\"),
        ("+a.b={token: one, n: 1, c: [null, 'x, y']}", "one"),
    ],
)
def test_a_secret_inside_a_dict_is_hidden_however_it_is_quoted(
    typed: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    variable = "LIT_FT_SECRET_A__B__TOKEN"
    [hidden] = without_secrets([typed])
    override = OverridesParser.create().parse_override(hidden)
    reference = f"${{oc.env:{variable}}}"
    assert override.value() == {"token": reference, "n": 1, "c": [None, "x, y"]}
    assert os.environ[variable] == value
    assert override.get_key_element() == "+a.b"


def test_a_dict_keeps_its_keys_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    typed = (
        r"a.b={x\ y: 1e-4, true: False, d: {}, e: [], f: ${seed}, g: 'null', token: abc, 3: nan}"
    )
    [hidden] = without_secrets([typed])
    parse = OverridesParser.create().parse_override
    wanted = parse(typed).value() | {"token": "${oc.env:LIT_FT_SECRET_A__B__TOKEN}"}
    assert repr(parse(hidden).value()) == repr(wanted)


def test_dicts_of_a_sweep_and_what_hydra_cannot_read_are_hidden(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    [hidden] = without_secrets(["a.b={token: one},{token: two}"])
    override = OverridesParser.create().parse_override(hidden)
    assert len(list(override.sweep_string_iterator())) == 2
    assert "one" not in hidden and "two" not in hidden
    assert os.environ["LIT_FT_SECRET_A__B__1__TOKEN"] == "two"
    [hidden] = without_secrets(["+a.b={token: 'it's-one'}"])
    assert hidden == "+a.b=${oc.env:LIT_FT_SECRET_A__B}"
    plain = ["optim=glob(adamw*)", "seed=range(1,4)", "optim.lr=interval(0,1)", "a={b: {c: 'd'}}"]
    assert without_secrets(plain) == plain


def test_each_value_of_a_sweep_has_a_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    [hidden] = without_secrets(["a.token=one,two"])
    first, second = (f"LIT_FT_SECRET_A__TOKEN__{n}" for n in (0, 1))
    assert hidden == f"a.token=${{oc.env:{first}}},${{oc.env:{second}}}"
    assert (os.environ[first], os.environ[second]) == ("one", "two")


@pytest.fixture
def experiment(tmp_path: Path) -> list[str]:
    file = tmp_path / "experiment" / "mine.yaml"
    file.parent.mkdir()
    file.write_text(
        "# @package _global_\nlogger: {mine: {api_key: in-a-file, other: '${oc.env:HOME}'}}\n"
        "groups: [{options: {token: in-a-list}}]\n"
    )
    return [f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine"]


def test_a_secret_of_a_file_becomes_a_reference_that_has_its_value(
    experiment: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = for_hydra(experiment)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", arguments)
    written = OmegaConf.to_yaml(config)
    assert "in-a-file" not in written and "in-a-list" not in written
    assert config.logger.mine.api_key == "in-a-file"
    assert config.groups[0].options.token == "in-a-list"
    assert config.logger.mine.other == os.environ["HOME"]


def test_files_that_a_sweep_tries_have_their_secrets_hidden(experiment: list[str]) -> None:
    folder = Path(experiment[0].partition("file://")[2].rstrip("]"))
    mine = (folder / "experiment" / "mine.yaml").read_text()
    (folder / "experiment" / "other.yaml").write_text(mine + "seed: 3\n")
    (folder / "experiment" / "none.yaml").write_text("# @package _global_\nseed: 3\n")
    arguments = for_hydra([experiment[0], "experiment=mine,other", "-m"])
    assert [one.partition("=")[0] for one in arguments[2:-1]] == [
        "++groups.0.options.token",
        "++logger.mine.api_key",
    ]
    assert arguments[-1] == "-m"
    with pytest.raises(ValueError, match="different secrets"):
        for_hydra([experiment[0], "experiment=mine,none", "-m"])


@pytest.mark.parametrize(
    "argument", ["+a.token=***", "+a.token=${oc.env:LIT_FT_SECRET_A__TOKEN}", "+a.b={token: '***'}"]
)
def test_what_a_runs_files_hold_is_no_secret(argument: str) -> None:
    with pytest.raises(ValueError, match=r"Give the secret again: a\..*token=SECRET"):
        composed([argument])


def test_what_a_run_recorded_gets_its_secrets_from_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorded = {"model": {"name": "a", "parts": [{"token": "***"}]}}
    with pytest.raises(ValueError, match="set the variable LIT_FT_SECRET_M__MODEL__PARTS__0__TOK"):
        with_secrets(recorded, "m")
    monkeypatch.setenv("LIT_FT_SECRET_M__MODEL__PARTS__0__TOKEN", "abc")
    assert with_secrets(recorded, "m") == {"model": {"name": "a", "parts": [{"token": "abc"}]}}
