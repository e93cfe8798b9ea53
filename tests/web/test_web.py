"""The calculator page's questions over HTTP: the figures of the command line, and nothing for strangers."""

import http.client
import io
import json
import re
import shlex
import threading
import zipfile
from pathlib import Path

import pytest

from estimators.models.published import KNOWN
from estimators.planning import methods
from memopt.web import server as served
from memopt.web.api import MOST_NBYTES, respond
from memopt.web.server import FILES, Server
from memopt.web.site import PYODIDE, packed, write
from memopt.web.view import _changes

PAGE = Path(served.__file__).parent / "page"
GPT2 = {"model": "gpt2", "seq": "128"}
SETTINGS = [
    {"model": "8B"},
    {"model": "8B", "world": "8", "gpu": "24GiB"},
    {"model": "meta-llama/Llama-3.2-1B-Instruct", "gpu": "rtx-3060", "seq": "256", "optim": ["adamw-8bit"]},
    {**GPT2, "gpu": "4GiB", "batch": "2", "checkpointing": "full", "optim": ["adamw", "adafactor", "adamw@paged"]},
    {**GPT2, "optim": ["adamw@cpu"], "offload_gradients": "true", "workspace": "64MiB", "gpu": "t4"},
    {**GPT2, "optim": ["adamw"], "lora": "8", "lora_dropout": "0.1", "quantised": "nf4", "gpu": "2GiB"},
    {**GPT2, "optim": ["adamw/zero1"], "world": "4", "mixed": "bf16"},
    {**GPT2, "optim": ["sgd"], "hyper": ["momentum=0.9"], "gradients": "fp32"},
    {**GPT2, "optim": ["adamw"], "release_gradients": True, "loss": "chunked", "attention": "eager"},
    {**GPT2, "deepspeed": True, "world": "2", "gpu": "24GiB"},
    {**GPT2, "optim": ["adamw"], "compile": True, "accumulate": "2", "outputs": "kept"},
    {"config": json.dumps(KNOWN["gpt2"]), "model": "ignored", "seq": "128", "gpu": "8GiB", "optim": ["adamw-4bit"]},
]


@pytest.fixture(scope="module")
def server():
    with Server() as one:
        threading.Thread(target=one.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield one
        one.shutdown()


@pytest.fixture
def ask(server):
    """``ask("POST", "/api/estimate", {…})`` is (status, headers, text); headers that are None are left out."""

    def call(method, path, content=None, /, **headers):
        body = content if isinstance(content, (bytes, type(None))) else json.dumps(content).encode()
        sent = {"Host": f"127.0.0.1:{server.server_port}", "Content-Type": "application/json"}
        sent |= {} if body is None else {"Content-Length": str(len(body))}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in sent.items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders(body)
        reply = connection.getresponse()
        found = reply.status, reply.headers, reply.read().decode()
        connection.close()
        return found

    return call


class TestFigures:
    @pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: ",".join(k for k in s if k != "seq"))
    def test_those_of_the_command_line(self, ask, run, tmp_path, monkeypatch, settings):
        monkeypatch.chdir(tmp_path)
        Path("config.json").write_text(settings.get("config", ""))
        status, _, text = ask("POST", "/api/estimate", settings)
        answer = json.loads(text)
        assert status == 200, answer
        _, verb, *argv = shlex.split(answer["command"])
        code, out, err = run(verb, *argv, "--json")
        assert (code in (0, 1), err) == (True, "")
        assert answer["estimate"] == json.loads(out)
        self.check_view(answer)

    def check_view(self, answer):
        """Bars are the same bytes as the estimate's peaks: those of the phases, and those of the peak among them."""
        view, specs = answer["view"], answer["estimate"]["specs"]
        for column, spec in zip(view["columns"], specs, strict=True):
            assert column["nbytes"] == spec["peak"]["gpu_nbytes"] == sum(k["nbytes"] for k in column["kinds"])
            assert column["high"] == spec["peak"]["high_nbytes"] <= view["scale"]
            (peak,) = (phase for phase in column["phases"] if phase["peak"])
            assert (peak["phase"], peak["nbytes"]) == (spec["peak"]["phase"], column["nbytes"])
            assert [k["nbytes"] for k in peak["kinds"]] == [k["nbytes"] for k in column["kinds"]]

    def test_a_plan_is_that_of_the_command_line_and_its_settings_fit(self, run, monkeypatch):
        monkeypatch.setattr(methods, "METHODS", methods.METHODS[:2])  # a whole search takes seconds
        settings = {**GPT2, "gpu": "24GiB", "batch": "2", "optim": ["adamw-8bit"], "checkpointing": "full"}
        status, text = respond("plan", json.dumps(settings).encode())
        answer = json.loads(text)
        _, out, _ = run("plan", "gpt2", "--gpu", "24GiB", "--batch", "2", "--seq", "128", "--json")
        assert (status, answer["plan"]) == (200, json.loads(out))
        (plan,), (shown,) = answer["plan"]["plans"], answer["view"]["plans"]
        assert shown["changes"] == ["optimizer adamw", "checkpointing full → none"]
        taken = {**settings, **shown["settings"]}
        (column,) = json.loads(respond("estimate", json.dumps(taken).encode())[1])["estimate"]["specs"]
        assert (column["verdict"], column["peak"]["process"]) == ("FITS", plan["peak"]["process"])
        assert _changes(shown["settings"], taken) == []

    @pytest.mark.parametrize("kind", ["accelerate", "deepspeed", "transformers", "python"])
    def test_a_configuration_is_that_of_the_command_line(self, run, kind):
        settings = {**GPT2, "gpu": "24GiB", "optim": ["adamw/zero1" if kind == "deepspeed" else "adamw"], "world": "2"}
        status, text = respond("emit", json.dumps({**settings, "kind": kind}).encode())
        argv = ("gpt2", "--seq", "128", "--gpu", "24GiB", "--optim", *settings["optim"], "--world", "2")
        assert (status, json.loads(text)["text"]) == (200, run("estimate", *argv, "--emit", kind)[1])


class TestRefused:
    @pytest.mark.parametrize(
        ("question", "settings", "said"),
        [
            ("estimate", [], "the settings are an object"),
            ("estimate", {"modell": "8B"}, "'modell' is not known"),
            ("estimate", {"model": 8}, "model=8 is not allowed"),
            ("estimate", {"model": "gpt2", "optim": "adamw"}, "a list of up to"),
            ("estimate", {"model": "gpt2", "optim": ["adamw"] * 33}, "a list of up to"),
            ("estimate", {"model": "gpt2", "float8": "yes"}, "true or false"),
            ("estimate", {"model": "x" * 501}, "text of up to 500"),
            ("estimate", {}, "which model?"),
            ("estimate", {"model": "gpt22"}, "nearest names: gpt2"),
            ("estimate", {"model": "/etc"}, "neither a parameter count"),
            ("estimate", {"model": "someone/something-of-theirs"}, "neither a parameter count"),
            ("estimate", {"model": "gpt2", "directory": "/tmp"}, "'directory' is not known"),
            ("estimate", {"model": "gpt2", "source": "/etc/passwd"}, "'source' is not known"),
            ("estimate", {"model": "gpt2", "html": "/tmp/x"}, "'html' is not known"),
            ("estimate", {"config": "{"}, "config.json is not JSON"),
            ("estimate", {"config": "[1]"}, "not a JSON object"),
            ("estimate", {"config": '{"a":' * 80 + "1" + "}" * 80}, "nested more than"),
            ("estimate", {"config": '{"model_type":"gpt2","model_type":"gpt2"}'}, "there twice"),
            ("estimate", {"model": "gpt2", "batch": "1e9"}, "--batch '1e9' is not allowed"),
            ("estimate", {"model": "gpt2", "gpu": "24"}, "has no unit"),
            ("estimate", {"model": "gpt2", "optim": ["adamw-7bit"]}, "unknown format '7bit'"),
            ("plan", {"model": "gpt2", "seq": "8"}, "needs a card"),
            ("plan", {"model": "gpt2", "gpu": "8GiB", "batch": "0", "seq": "8"}, "--batch '0' is not allowed"),
            ("emit", {"model": "gpt2"}, "kind=None is not allowed"),
            ("emit", {"model": "gpt2", "kind": "slurm"}, "'slurm' is not allowed"),
        ],
    )
    def test_in_one_sentence(self, question, settings, said):
        status, text = respond(question, json.dumps(settings).encode())
        error = json.loads(text)["error"]
        assert (status, said in error, "\n" in error) == (400, True, False), error

    def test_a_body_that_is_no_json(self, ask):
        assert [ask("POST", "/api/estimate", body)[0] for body in (b"", b"\xff", b"[" * 5000)] == [400] * 3

    def test_a_defect_is_said_and_shown_where_the_server_runs(self, monkeypatch, capsys):
        monkeypatch.setattr("memopt.web.api.estimated", lambda args: 1 / 0)
        status, text = respond("estimate", b'{"model": "gpt2"}')
        assert (status, "a defect of memopt (ZeroDivisionError)" in text) == (500, True)
        assert "ZeroDivisionError: division" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("method", "path", "headers", "status"),
        [
            ("GET", "/", {"Host": "evil.example"}, 403),
            ("GET", "/", {"Host": None}, 403),
            ("GET", "/", {"Host": "127.0.0.1"}, 403),
            ("POST", "/api/choices", {"Host": "evil.example:80"}, 403),
            ("POST", "/api/choices", {"Origin": "http://evil.example"}, 403),
            ("POST", "/api/choices", {"Origin": "null"}, 403),
            ("POST", "/api/choices", {"Sec_Fetch_Site": "cross-site"}, 403),
            ("GET", "/app.js", {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "no-cors"}, 403),
            ("GET", "/", {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate"}, 200),
            ("POST", "/api/choices", {"Sec_Fetch_Site": "same-origin"}, 200),
            ("POST", "/api/choices", {"Content_Type": "text/plain"}, 415),
            ("POST", "/api/choices", {"Content_Length": None}, 411),
            ("POST", "/api/choices", {"Content_Length": "-1"}, 411),
            ("POST", "/api/choices", {"Content_Length": "1_0"}, 411),
            ("POST", "/api/choices", {"Content_Length": None, "Transfer_Encoding": "chunked"}, 411),
            ("POST", "/api/choices", {"Content_Length": str(MOST_NBYTES + 1)}, 413),
            ("POST", "/api/choices", {"Content_Length": "9" * 40}, 413),
            ("POST", "/api/nothing", {}, 404),
            ("POST", "/estimate", {}, 404),
            ("GET", "/api/estimate", {}, 404),
            ("GET", "/../server.py", {}, 404),
            ("GET", "/page/../../../pyproject.toml", {}, 404),
            ("GET", "/%2e%2e/server.py", {}, 404),
            ("GET", "//etc/passwd", {}, 404),
            ("PUT", "/", {}, 501),
        ],
    )
    def test_what_is_not_for_this_server(self, ask, method, path, headers, status):
        content = {} if method == "POST" else None
        found, _, text = ask(method, path, content, **headers)
        assert found == status
        assert status == 200 or isinstance(json.loads(text)["error"], str)


class TestPage:
    def test_every_file_is_served_with_its_type_and_allows_nothing_from_elsewhere(self, ask):
        for path, (name, kind) in FILES.items():
            status, headers, text = ask("GET", path)
            assert (status, headers["Content-Type"], text) == (200, kind, (PAGE / name).read_text())
            assert "default-src 'none'" in headers["Content-Security-Policy"]
            status, headers, nothing = ask("HEAD", path)
            assert (status, nothing, int(headers["Content-Length"])) == (200, "", len(text.encode()))

    def test_the_files_name_no_address_but_those_of_the_page(self):
        for path in PAGE.iterdir():
            text = path.read_text().replace("http://www.w3.org/2000/svg", "")
            assert "//" not in re.sub(r"^\s*// .*$|\s// .*$", "", text, flags=re.M), path.name
            assert text.count("\n") <= 300

    def test_everything_that_is_imported_is_served(self):
        scripts = {path.name: path.read_text() for path in PAGE.glob("*.js")}
        found = {name for text in scripts.values() for name in re.findall(r'from "\./([\w.]+)"', text)}
        assert found | {"app.js", "worker.js"} == scripts.keys()
        assert scripts.keys() - {"worker.js"} == {name for name, _ in FILES.values() if name.endswith(".js")}

    def test_every_field_has_a_label_and_a_name_that_python_knows(self):
        text = (PAGE / "index.html").read_text()
        fields = re.findall(r'<(?:input|select|textarea) id="(\w+)" name="(\w+)"', text)
        assert len(fields) >= 13
        for id_, name in fields:
            assert f'<label for="{id_}"' in text
            value = {"optim": ["adamw"], "more": ""}.get(name, "")
            if name != "more":
                assert "is not known" not in respond("estimate", json.dumps({name: value}).encode())[1]


class TestSite:
    @pytest.fixture
    def pyodide(self, tmp_path):
        folder = tmp_path / "pyodide"
        folder.mkdir()
        for name in PYODIDE:
            (folder / name).write_text("{}")
        return folder

    def test_it_is_the_page_with_its_engine_in_the_browser(self, run, tmp_path, pyodide):
        code, out, err = run("web", "--write", str(tmp_path / "site"), "--pyodide", str(pyodide))
        assert (code, err) == (0, "")
        assert out.startswith(f"written: {tmp_path / 'site'}\n")
        written = {str(path.relative_to(tmp_path / "site")) for path in (tmp_path / "site").rglob("*.*")}
        assert written >= {*(p.name for p in PAGE.iterdir()), "memopt.zip", *(f"pyodide/{n}" for n in PYODIDE)}
        assert 'data-engine="pyodide"' in (tmp_path / "site" / "index.html").read_text()
        for path in PAGE.glob("*.js"):
            assert (tmp_path / "site" / path.name).read_bytes() == path.read_bytes()

    def test_the_archive_is_the_sources_and_always_the_same_bytes(self):
        first = packed()
        names = zipfile.ZipFile(io.BytesIO(first)).namelist()
        assert {"memopt/web/api.py", "estimators/calculator.py", "memopt/spec/__init__.py"} <= set(names)
        assert all(name.endswith(".py") for name in names)
        assert first == packed()

    def test_without_pyodide_it_says_how_to_get_it(self, run, tmp_path, pyodide):
        (pyodide / PYODIDE[2]).unlink()
        for argv, said in [
            (("--write", str(tmp_path / "s")), "npm install pyodide"),
            (("--write", str(tmp_path / "s"), "--pyodide", str(pyodide)), f"has no {PYODIDE[2]}; "),
            (("--pyodide", str(pyodide)), "--pyodide is for --write"),
            (("--port", "70000"), "--port '70000' is not allowed"),
        ]:
            code, _, err = run("web", *argv)
            assert (code, said in err, err.count("\n")) == (2, True, 1), err
        assert not (tmp_path / "s").exists()

    def test_a_folder_that_cannot_be_written_is_a_sentence(self, run, tmp_path, pyodide):
        (tmp_path / "taken").write_text("")
        code, _, err = run("web", "--write", str(tmp_path / "taken"), "--pyodide", str(pyodide))
        assert (code, "cannot be written" in err, err.count("\n")) == (2, True, 1), err

    def test_a_folder_without_pyodide_is_left_alone(self, tmp_path):
        with pytest.raises(ValueError, match="npm install pyodide"):
            write(tmp_path / "s", tmp_path)


def test_a_port_that_is_taken_is_a_sentence(server, run):
    code, _, err = run("web", "--port", str(server.server_port))
    assert (code, "cannot be had" in err) == (2, True)
