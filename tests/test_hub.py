"""Models on the hub, against a small server here: what is fetched, the cache, offline mode, and what every refusal says."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.builders import model_of
from tests.e2e.command import ROOT
from tests.hub_server import Hub, serving
from vitq_compiler.errors import ModelError
from vitq_compiler.hub import Reference, parse

NOWHERE = "http://127.0.0.1:9"  # the port for what is thrown away: nobody listens
ASK = """
import json, sys
from vitq_compiler import hub
from vitq_compiler.errors import ModelError
for line in sys.stdin:
    try:
        found = hub.fetch(hub.parse(line.strip()))
        answer = {"file": str(found.file), "reference": str(found.reference), "why": found.why, "warnings": found.warnings}
    except ModelError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer), flush=True)
"""


class Asked:
    """A process of its own that fetches: the library reads its settings when it is imported."""

    def __init__(self, cache: Path, endpoint: str, **settings: str) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        environment = {**kept, "HF_HOME": str(cache), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1", **settings}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        self.process = subprocess.Popen([sys.executable, "-c", ASK], cwd=ROOT, env=environment, **pipes)

    def __call__(self, reference: str) -> dict[str, Any]:
        """Fetch; what was found, or the error."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(f"{reference}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())  # type: ignore[no-any-return]

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def model_with_data(folder: Path) -> dict[str, bytes]:
    """A model and the file of its external data, as files of a repository."""
    proto = model_of("g (float[2048] x) => (float[2048] y) { y = Add (x, w) }", w=np.ones(2048, np.float32))
    onnx.save(proto, folder / "model.onnx", save_as_external_data=True, location="model.onnx_data")
    return {f"onnx/{name}": (folder / name).read_bytes() for name in ("model.onnx", "model.onnx_data")}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A hub with a few repositories."""
    files = model_with_data(tmp_path_factory.mktemp("model"))
    with serving() as hub:
        others = {"config.json": b"{}", "preprocessor_config.json": b"{}", "model.safetensors": b"?", "onnx/model_fp16.onnx": b"?"}
        hub.add("me/vit", {"onnx/model.onnx": b"an older one"}, "v1", "a/branch")
        hub.add("me/vit", files | others)
        hub.add("me/pair", {"a.onnx": files["onnx/model.onnx"], "b.onnx": b"?"}, "x/y")
        hub.add("me/weights", {"model.safetensors": b"?"})
        hub.add("me/gated", files)
        hub.gated.add("me/gated")
        hub.broken.add("me/broken")
        yield hub


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the library's cache."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def ask(hub: Hub, cache: Path) -> Iterator[Asked]:
    """Fetches with a connection."""
    asked = Asked(cache, hub.endpoint)
    yield asked
    asked.close()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf:me/vit", Reference("me/vit")),
        ("hf://me/vit.b-16", Reference("me/vit.b-16")),
        ("hf:me/vit@v1.0", Reference("me/vit", "v1.0")),
        ("hf:me/vit@a/branch", Reference("me/vit", "a/branch")),
        ("hf:me/vit@refs/pr/3", Reference("me/vit", "refs/pr/3")),
        ("hf:me/vit/onnx/vision_model.onnx", Reference("me/vit", None, "onnx/vision_model.onnx")),
        ("hf:me/vit@v1/model.onnx", Reference("me/vit", "v1", "model.onnx")),
        ("hf:me/vit@refs/pr/3/onnx/model.onnx", Reference("me/vit", "refs/pr/3", "onnx/model.onnx")),
        ("hf:me/vit@a%2Fbranch/onnx/model.onnx", Reference("me/vit", "a/branch", "onnx/model.onnx")),
    ],
)
def test_references(text: str, expected: Reference) -> None:
    assert parse(text) == parse(str(expected)) == expected
    assert parse(str(Path(text))) == expected, "a path keeps one slash of two"


@pytest.mark.parametrize("text", ["hf:", "hf:vit", "hf:me/", "hf:/vit", "hf:me/vit/", "hf:me/vit@", "hf:me/vit/config.json", "hf:me/a b"])
def test_what_is_no_reference(text: str) -> None:
    with pytest.raises(ModelError, match=r"is no model on the hub; write hf:owner/name, hf:owner/name@revision or"):
        parse(text)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    from vitq_compiler.hub import fetch

    for name in ("huggingface_hub", "huggingface_hub.errors"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModelError, match=r"^model hf:me/vit: needs huggingface_hub .*; pip install 'vitq-compiler\[hub\]'$"):
        fetch(parse("hf:me/vit"))


@pytest.mark.hub
def test_the_model_its_data_and_its_configs_are_fetched(hub: Hub, ask: Asked, cache: Path) -> None:
    commit = hub.commit("me/vit", "main")
    found = ask("hf:me/vit")
    assert found["reference"] == f"hf:me/vit@{commit}/onnx/model.onnx"
    assert found["why"] == "onnx/model.onnx, by its name the whole model in full precision; left: onnx/model_fp16.onnx"
    folder = Path(found["file"]).parents[1]
    assert folder.is_relative_to(cache)
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == {"config.json", "preprocessor_config.json", "onnx/model.onnx", "onnx/model.onnx_data"}


@pytest.mark.hub
def test_what_is_cached_is_not_fetched_again(hub: Hub, ask: Asked) -> None:
    ask("hf:me/vit")
    hub.requests.clear()
    ask("hf:me/vit")
    assert [request for request in hub.requests if request.startswith("GET") and "/resolve/" in request] == []


@pytest.mark.parametrize("revision", ["v1", "a/branch", "a%2Fbranch"])
@pytest.mark.hub
def test_a_revision(hub: Hub, ask: Asked, revision: str) -> None:
    found = ask(f"hf:me/vit@{revision}")
    assert found["reference"] == f"hf:me/vit@{hub.commit('me/vit', 'v1')}/onnx/model.onnx"
    assert Path(found["file"]).read_bytes() == b"an older one"


@pytest.mark.hub
def test_a_file(hub: Hub, ask: Asked) -> None:
    found = ask("hf:me/pair/a.onnx")
    assert (found["reference"], found["why"]) == (f"hf:me/pair@{hub.commit('me/pair', 'main')}/a.onnx", "")


@pytest.mark.parametrize(
    ("reference", "fault"),
    [
        ("hf:me/none", "no such repository on {endpoint}, or a private one; check its name, or log in with `hf auth login`"),
        ("hf:me/vit@v9", "the repository has no revision v9; give a branch, tag or commit of it"),
        ("hf:me/vit/onnx/none.onnx", "the repository has no such file at this revision; leave it out to see which there are"),
        ("hf:me/gated", "its owner grants access on request; ask for it on {endpoint}/me/gated, then log in"),
        ("hf:me/broken", "the hub refuses ("),
        ("hf:me/x--y", "; write hf:owner/name"),
        ("hf:me/pair", "holds several models, a.onnx, b.onnx; give one of them, such as hf:me/pair/a.onnx"),
        ("hf:me/pair@x%2Fy", "holds several models, a.onnx, b.onnx; give one of them, such as hf:me/pair@x%2Fy/a.onnx"),
        ("hf:me/weights", "no .onnx file in this folder; export the model to ONNX first"),
    ],
)
@pytest.mark.hub
def test_refusals(hub: Hub, ask: Asked, reference: str, fault: str) -> None:
    error = ask(reference)["error"]
    assert error.startswith(f"model {reference}: ")
    assert fault.format(endpoint=hub.endpoint) in error
    assert "\n" not in error


@pytest.mark.parametrize("offline", [True, False])
@pytest.mark.hub
def test_without_a_connection(hub: Hub, ask: Asked, cache: Path, offline: bool) -> None:
    online = {name: ask(name) for name in ("hf:me/vit", "hf:me/vit@v1")}
    asked = Asked(cache, hub.endpoint, HF_HUB_OFFLINE="1") if offline else Asked(cache, NOWHERE)
    hub.requests.clear()
    for name, before in online.items():
        found = asked(name)
        assert (found["file"], found["reference"]) == (before["file"], before["reference"])
        if offline:
            assert found["warnings"] == []
        else:
            (warning,) = found["warnings"]
            assert warning.startswith(f"{NOWHERE} cannot be reached: of {name}, commit ")
    reason = "offline mode is on (HF_HUB_OFFLINE)" if offline else f"{NOWHERE} cannot be reached"
    for name in ("hf:me/unknown", "hf:me/vit@v9", "hf:me/vit/onnx/model_fp16.onnx"):
        assert asked(name)["error"].startswith(f"model {name}: {reason}, and the cache does not hold it; ")
    asked.close()
    assert hub.requests == []
