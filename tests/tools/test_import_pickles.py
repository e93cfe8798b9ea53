"""What files of other tools say is never executed."""

import os
import pickle
import sys
from pathlib import Path

import pytest
import torch

import memopt
from memopt.checkpoint.importers import safe_unpickle
from tests.helpers.folders import model


class Evil:
    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


def test_a_file_is_not_executed(tmp_path):
    torch.save({"state": Evil(exec, "raise SystemExit"), "param_groups": []}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="without executing"):
        memopt.load(tmp_path / "evil.pt", optimizer=memopt.create(model(), "adamw"))


@pytest.mark.parametrize("call", [(exec, "raise SystemExit"), (os.system, "exit 1"), (getattr, "x")])
def test_metadata_is_not_executed(tmp_path, call):
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"state_dict_metadata": Evil(*call)}))
    with pytest.raises(ValueError, match=rf"it names \S+\.{call[0].__name__}"):
        memopt.load(tmp_path, optimizer=memopt.create(model(), "adamw"))


def test_deepspeeds_files_are_not_executed(tmp_path):
    torch.save({"param_shapes": Evil(exec, "raise SystemExit")}, tmp_path / "mp_rank_00_model_states.pt")
    torch.save({}, tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(ValueError, match=r"mp_rank_00_model_states.pt cannot be read .* it names \S*exec"):
        memopt.load(tmp_path, optimizer=memopt.create(model(), "adamw"))


def test_a_class_that_is_known_stands_for_nothing_but_its_values():
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

    modules = ("torch.distributed.checkpoint.metadata",)
    found = safe_unpickle.tree(pickle.dumps([MetadataIndex("a"), BytesStorageMetadata()]), modules, "x")
    assert [type(x).__mro__[1] for x in found] == [safe_unpickle.Inert, safe_unpickle.Inert]
    assert found[0].fqn == "a"
    assert Path(sys.modules[MetadataIndex.__module__].__file__).name == "metadata.py"


def test_a_value_of_an_enumeration_as_python_3_11_writes_it():
    from torch.distributed.checkpoint.metadata import MetadataIndex

    class Value(Evil):
        def __init__(self, *arguments):
            self.call = getattr, arguments

    modules = ("torch.distributed.checkpoint.metadata",)
    found = safe_unpickle.tree(pickle.dumps(Value(MetadataIndex, "NAME")), modules, "x")
    assert isinstance(found, safe_unpickle.Inert)
    assert found.arguments == ("NAME",)
    for arguments in (("text", "upper"), (MetadataIndex, "NAME", None)):
        with pytest.raises(ValueError, match=r"it names builtins\.getattr"):
            safe_unpickle.tree(pickle.dumps(Value(*arguments)), modules, "x")
