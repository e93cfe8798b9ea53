"""``memopt convert`` and ``memopt inspect`` on checkpoints of our own."""

import io
import json
import sys

import pytest
import torch

import memopt
from tests.helpers.cases import train
from tests.helpers.saved import assert_same_state, build


def test_the_command_line_converts_and_inspects(tmp_path, capsys):
    from memopt.cli import main

    model, opt = build("adamw", {})
    train(model, opt, 0, 2)
    memopt.save(tmp_path / "a", model=model, optimizer=opt)
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "adamw-8bit", "--dry-run"]) == 0
    assert not (tmp_path / "b").exists()
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "adamw-8bit"]) == 0
    assert main(["convert", str(tmp_path / "b"), str(tmp_path / "c.pt"), "--to", "torch"]) == 0
    assert main(["convert", str(tmp_path / "c.pt"), str(tmp_path / "d"), "--to", "lion"]) == 0
    assert "exp_avg_sq: not kept by the new spec, dropped" in capsys.readouterr().out
    other, converted = build("adamw-8bit", {})
    memopt.load(tmp_path / "b", model=other, optimizer=converted)
    opt.convert_("adamw-8bit")
    assert_same_state(opt, converted)
    assert main(["inspect", str(tmp_path / "b")]) == 0
    assert "exp_avg (8bit): 110,322 elements in 5 tensors" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "b"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["schema"] == "memopt.inspect/1"
    opt.state[model.vector]["exp_avg.scales"][0] = float("nan")
    memopt.save(tmp_path / "sick", optimizer=opt)
    assert main(["inspect", str(tmp_path / "sick")]) == 1
    assert "not finite in: vector" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "nothing")]) == 2


def test_what_the_user_has_put_into_the_state_is_converted_too(tmp_path):
    """But for what the new rule keeps itself."""
    from memopt.cli import main

    model, opt = build("adamw", {})
    train(model, opt, 0, 2)
    opt.state[model.vector]["note"], opt.state[model.vector]["ema"] = [3, "x"], torch.arange(5.0)
    opt.state[model.vector]["square_avg"] = torch.ones(3)
    opt.state["run"] = {"epoch": 4}
    memopt.save(tmp_path / "a", model=model, optimizer=opt)
    for spec in ("adamw-8bit", "rmsprop"):
        fill = ["--fill", "square_avg=0"] if spec == "rmsprop" else []
        assert main(["convert", str(tmp_path / "a"), str(tmp_path / spec), "--to", spec, *fill]) == 0
        other, converted = build(spec, {})
        memopt.load(tmp_path / spec, model=other, optimizer=converted)
        state = converted.state[other.vector]
        assert state["note"] == [3, "x"]
        assert torch.equal(state["ema"], torch.arange(5.0))
        assert torch.equal(state["square_avg"], torch.ones(3)) == (spec != "rmsprop")
        assert converted.state["run"] == {"epoch": 4}


def test_on_a_terminal_there_is_a_bar(monkeypatch):
    from memopt.cli.convert import bar

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with bar("converting", 2000) as progress:
        progress(1000)
        progress(1000)
    assert "converting" in sys.stderr.getvalue()
    assert "2.0/2.0 kB" in sys.stderr.getvalue()
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with bar("converting", 2000) as progress:
        progress(2000)
    assert not sys.stderr.getvalue()


def test_what_would_be_ignored_is_refused(tmp_path, run):
    _, opt = build("adamw", {})
    opt.init_state()
    memopt.save(tmp_path / "a", optimizer=opt)
    arguments = ["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to"]
    code, _, err = run(*arguments, "torch", "--engine", "native")
    assert (code, "--engine native is of a spec of ours; --to torch is a tool" in err) == (2, True)
    code, _, err = run(*arguments, "adamw-8bit", "--from", "lion")
    assert (code, "is of adamw, not 'lion'" in err) == (2, True)
    with pytest.raises(ValueError, match="is of adamw, not 'lion'"):
        memopt.load(tmp_path / "a", optimizer=opt, rule="lion")
    with pytest.raises(ValueError, match="are about an optimizer's state; give optimizer="):
        memopt.load(tmp_path / "a", hyper=False)
    assert run(*arguments, "adamw-8bit", "--from", "adamw")[0] == 0
