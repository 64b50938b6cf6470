import torch

from allmlp.benchmark import machine
from allmlp.machine import cores, surroundings


def test_surroundings_name_machine_and_versions() -> None:
    found = surroundings()
    assert found["torch"] == torch.__version__
    assert found["cores"] == cores() >= 1
    assert found["device"]


def test_measurements_name_the_same_processor() -> None:
    facts = machine()
    assert facts["cores"] == cores()
    assert facts.get("gpu", facts["processor"]) == surroundings()["device"]
