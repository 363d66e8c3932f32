"""Names of other trainers, and options with dashes, are what they mean here, or are answered."""

from __future__ import annotations

import pytest
from hydra._internal.utils import get_args_parser

from lit_ft.run import command_line
from lit_ft.run.command_line import understood
from lit_ft.run.other_trainers import ANY, BY_NAME, NAMES
from lit_ft.run.translation import translated
from tests.support.names_table import BEGIN, END, PAGE, tables
from tests.support.running import CONF


def arguments(*typed: str) -> list[str]:
    return understood(typed, config_dir=CONF).arguments


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("learning_rate=1e-4", "optim.lr=1e-4"),
        ("+learning_rate=1e-4", "optim.lr=1e-4"),
        ("--learning_rate 1e-4", "optim.lr=1e-4"),
        ("--learning-rate=1e-4", "optim.lr=1e-4"),
        ("--optim.lr 1e-4 --seed 1", "optim.lr=1e-4 seed=1"),
        ("--model tiny -m --seed 1,2", "model=tiny seed=1,2 -m"),
        ("--max_steps -1", "trainer.max_steps=-1"),
        ("--bf16 --packing seed=1", "trainer.precision=bf16-mixed data.packing=true seed=1"),
        ("--load_in_4bit False", ""),
        ("--lora_target_modules q v", "adapter=lora adapter.target_modules=[q,v]"),
        ("lora_target=q,v adapter=dora", "adapter.target_modules=[q,v] adapter=dora"),
        ("use_peft=true load_in_4bit=true lora_r=8", "adapter=qlora adapter.r=8"),
        ("max_length=99 data.overlong=drop", "data.max_length=99 data.overlong=drop"),
        ("-m learning_rate=1e-4,1e-3", "optim.lr=1e-4,1e-3 -m"),
        ("seed=1 --cfg job --learning_rate 1", "seed=1 optim.lr=1 --cfg job"),
        ("optim=adamw_torch", "optim=adamw"),
        ("num_epochs=3.0", "trainer.max_epochs=3"),
    ],
)
def test_a_name_means_what_it_means_there(typed: str, meant: str) -> None:
    assert arguments(*typed.split()) == meant.split()


@pytest.mark.parametrize(
    "typed",
    [
        "optim=adafactor seed=1 ~callbacks.samples",
        "-m optim=adamw,sgd hydra/launcher=slurm",
        "--cfg job --resolve optim=sgd",
        "--config-name other --config-dir my.yaml",
        "--multi seed=1,2",
        "--info searchpath",
        "-cd conf.yaml seed=1",
    ],
)
def test_what_hydra_knows_stays_as_it_is(typed: str) -> None:
    assert arguments(*typed.split()) == typed.split()
    assert not understood(typed.split(), config_dir=CONF).said


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("eval_steps=100", "eval_steps=100, here: trainer.val_check_interval, which counts"),
        ("--template qwen", "template=qwen is no setting here, leave it out: the tokenizer's own"),
        ("fp16=maybe", "fp16=maybe: give one of true, false"),
        ("stage=dpo", "stage=dpo is no setting here, leave it out"),
        ("my.yaml", "--config my.yaml, not my.yaml alone"),
        (
            "--lerning_rate 1",
            "--lerning_rate: there is no 'lerning_rate'. Did you mean learning_rate?",
        ),
        ("--optm.lr 1", "--optm.lr: there is no 'optm'. Did you mean optim?"),
        ("--config", "--config needs a file"),
        ("num_train_epochs=3 num_epochs=9", "num_epochs=9: trainer.max_epochs=9 contradicts"),
        ("num_train_epochs=3 trainer.max_epochs=2", "trainer.max_epochs=2 contradicts"),
    ],
)
def test_what_means_something_else_is_answered(typed: str, answer: str) -> None:
    with pytest.raises(ValueError) as error:
        arguments(*typed.split())
    assert answer in str(error.value)


def test_a_run_says_what_it_has_understood() -> None:
    said = understood(["--bf16", "stage=sft"], config_dir=CONF).said
    assert said == "Here, bf16=true is trainer.precision=bf16-mixed; stage=sft is nothing to set."


def test_a_name_belongs_to_one_trainer() -> None:
    assert len(BY_NAME) == sum(map(len, NAMES.values())) > 100


@pytest.mark.parametrize("name", BY_NAME)
def test_each_name_is_translated_or_answered(name: str) -> None:
    one = BY_NAME[name]
    for value in {*one.values, "1"} - {ANY}:
        try:
            found = translated(name, value)
        except ValueError as error:
            answers = (", here: ", " is no setting here, leave it out: ", ": give one of ")
            assert str(error).startswith(tuple(f"{name}={value}{one}" for one in answers))
        else:
            assert found is not None
    assert one.here or one.values or one.why


def test_the_docs_list_every_name() -> None:
    _, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    assert rest.partition(END)[0] == tables(), "make names writes it"


def test_the_options_of_hydra_are_known() -> None:
    takes_one = {}
    for action in get_args_parser()._actions:
        for option in action.option_strings:
            takes_one[option] = action.nargs != 0
    known = command_line._OF_HYDRA
    assert {o: takes_one[o] for o in takes_one if o.startswith("--")} == known
    assert {o for o in takes_one if not o.startswith("--") and takes_one[o]} == set(
        command_line._SHORT
    )
