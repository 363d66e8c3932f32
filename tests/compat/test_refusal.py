"""One error, two languages: Python's and the command line's."""

import pickle

import pytest

from lit_ft.compat.refusal import Refusal, Remedy, located, message_on_command_line
from lit_ft.distributed.plan import Misconfiguration

FSDP = Remedy("use FSDP2Strategy()", {"strategy": "fsdp"})
WHOLE = Remedy("leave LayerwiseUpdate out", {"update": "whole"})
RATE = Remedy("lower the learning rate", advice="lower optim.lr")


@pytest.mark.parametrize(
    ("remedies", "python", "command_line"),
    [
        ((), "It is so.", "It is so."),
        ((FSDP,), "It is so. Use FSDP2Strategy().", "It is so. Use strategy=fsdp."),
        (
            (FSDP, WHOLE),
            "It is so. Use FSDP2Strategy() or leave LayerwiseUpdate out.",
            "It is so. Use strategy=fsdp or update=whole.",
        ),
        (
            (WHOLE, FSDP, RATE),
            "It is so. Leave LayerwiseUpdate out, use FSDP2Strategy(), or lower the learning rate.",
            "It is so. Use update=whole, strategy=fsdp, or lower optim.lr.",
        ),
    ],
)
def test_a_refusal_speaks_to_both(remedies, python, command_line):
    refusal = Refusal("It is so", *remedies)
    assert str(refusal) == python
    assert refusal.on_command_line == command_line


def test_it_is_what_lightnings_users_catch_and_crosses_processes():
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    refusal = pickle.loads(pickle.dumps(Misconfiguration("It is so", FSDP)))
    assert isinstance(refusal, MisconfigurationException)
    assert isinstance(refusal, ValueError)
    assert refusal.remedies == (FSDP,)


def test_a_place_in_front_keeps_the_remedies():
    found = located(Refusal("it is so", FSDP), "my.jsonl:7")
    assert message_on_command_line(found) == "my.jsonl:7: it is so. Use strategy=fsdp."
    plain = located(ValueError("it is so"), "my.jsonl:7")
    assert (type(plain), str(plain)) == (ValueError, "my.jsonl:7: it is so")
