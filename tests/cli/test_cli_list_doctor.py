"""memopt list and doctor as a person or a script meets them."""

import json
import os
from pathlib import Path

import pytest

import memopt
from memopt.cli import doctor

ROOT = Path(__file__).parents[2]


class TestList:
    def test_every_spec_is_in_the_json_and_reads_back(self, run):
        form = json.loads(run("list", "--json")[1])
        assert [memopt.parse(s["spec"]) for s in form["specs"]] == list(memopt.specs())
        assert "aliases" not in form
        assert json.loads(run("list", "--json", "--aliases")[1])["aliases"]["paged_adamw_8bit"] == "adamw-8bit@paged"

    def test_the_matrix_says_which_pairs_exist(self, run):
        code, out, _ = run("list")
        assert code == 0
        lines = out.splitlines()
        formats = next(line for line in lines if "32bit" in line).split()
        pairs = {(s.rule, s.format) for s in memopt.specs()}
        rows = {line.split()[0]: line.split()[1:] for line in lines if len(line.split()) == len(formats) + 1}
        for rule in {rule for rule, _ in pairs}:
            assert [cell != "-" for cell in rows[rule]] == [(rule, fmt) in pairs for fmt in formats]
        assert max(map(len, lines)) <= 110

    def test_aliases(self, run):
        lines = run("list", "--aliases")[1].splitlines()
        assert all(str(memopt.parse(line.split()[0])) == str(memopt.parse(line.split()[1])) for line in lines)


class TestDoctor:
    def test_each_line_has_a_status(self, run):
        code, out, _ = run("doctor")
        assert code == 0
        firsts = {line.split()[0] for line in out.splitlines() if not line.startswith(" ")}  # others go on with a text
        assert firsts <= {"ok", "note", "missing"}
        for what in ("Python", "torch", "CUDA", "bitsandbytes", "host memory", "TMPDIR", "C++ compiler"):
            assert what in out

    def test_a_deepspeed_file_that_replaces_the_optimizer_is_said(self, run, tmp_path, monkeypatch):
        monkeypatch.setattr(doctor, "findings", lambda: [])
        replacing, offload = tmp_path / "ds.json", {"zero_stage": 2, "offload_optimizer_device": "cpu"}
        replacing.write_text(json.dumps({"optimizer": {"type": "AdamW"}}))
        cases = {
            replacing: '"optimizer" section (AdamW)',
            (tmp_path / "named.yaml"): '"optimizer" section (AdamW)',
            (tmp_path / "fields.yaml"): "DeepSpeed's own CPU Adam",
            (tmp_path / "right.json"): "",
        }
        sections = [{"deepspeed_config_file": "ds.json"}, offload]
        for path, section in zip(list(cases)[1:3], sections, strict=True):  # JSON is YAML
            path.write_text(f"distributed_type: DEEPSPEED\ndeepspeed_config: {json.dumps(section)}\n")
        list(cases)[3].write_text(json.dumps(memopt.deepspeed_config("adamw-8bit/zero2", offload=True)))
        for path, words in cases.items():
            code, out, _ = run("doctor", "--deepspeed", str(path), "--json")
            (found,) = json.loads(out)["findings"]
            assert code == 0
            assert found["status"] == ("note" if words else "ok")
            assert words in found["text"]
        code, _, err = run("doctor", "--deepspeed", str(tmp_path / "none.json"))
        assert code == 2
        assert "No such file" in err

    def test_a_missing_package_says_how_to_install_it(self, run, monkeypatch):
        def nowhere(name):
            raise doctor.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(doctor.metadata, "version", nowhere)
        assert doctor.package("deepspeed").text.endswith("pip install deepspeed")
        code, out, _ = run("doctor", "--json")
        assert code == 1
        missing = {f["what"] for f in json.loads(out)["findings"] if f["status"] == "missing"}
        assert missing == set(doctor.PACKAGES)

    def test_optional_packages_may_be_missing(self, run, monkeypatch):
        version = doctor.metadata.version
        monkeypatch.setattr(doctor.metadata, "version", lambda name: version(name.replace("deepspeed", "no-such")))
        code, out, _ = run("doctor")
        assert code == 0
        assert "missing  deepspeed" in out

    def test_temporary_files_in_memory_are_a_note(self, monkeypatch):
        monkeypatch.setattr(doctor, "file_system", lambda directory: "tmpfs")
        assert doctor.temporary_files().status == "note"

    def test_the_compiler_is_looked_for(self, monkeypatch, tmp_path):
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CXX", raising=False)
        assert doctor.compiler().status == "note"
        fake = tmp_path / "g++"
        fake.write_text("#!/bin/sh\n")
        os.chmod(fake, 0o755)
        assert doctor.compiler() == ("C++ compiler", "ok", str(fake), False)
        monkeypatch.setenv("CXX", "no-such-compiler")
        assert "CXX=no-such-compiler" in doctor.compiler().text

    @pytest.mark.parametrize(("content", "limit"), [("max\n", None), ("1073741824\n", 2**30), (None, None)])
    def test_container_limits(self, tmp_path, content, limit):
        path = tmp_path / "memory.max"
        if content is not None:
            path.write_text(content)
        assert doctor.container_limit(str(path)) == limit


#: What takes longer to import than an estimate takes, and is imported by something that an estimate needs.


def test_doctor_needs_no_compiler_where_the_package_came_with_its_kernels(monkeypatch, tmp_path):
    from memopt.cli import doctor
    from memopt.kernels import loader

    monkeypatch.setenv("CXX", "none")
    monkeypatch.setattr(loader, "INSTALLED", tmp_path / "library.so")
    assert doctor.compiler().status == "note"
    loader.INSTALLED.touch()
    found = doctor.compiler()
    assert found.status == "ok"
    assert "came with its kernels" in found.text
