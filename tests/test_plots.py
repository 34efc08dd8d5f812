"""Pictures of channel ranges: what they show, and what is said where they cannot be drawn."""

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from tests.builders import Sizes, vit
from vitq_compiler.cli import main
from vitq_compiler.diagnosis import diagnose
from vitq_compiler.errors import OutputError
from vitq_compiler.plots import Picture, Ranges, check_plots, draw

PNG = b"\x89PNG"


def test_waste() -> None:
    even = Ranges(np.full(8, -1.0), np.full(8, 1.0))
    assert even.waste == 1
    assert Ranges(np.zeros(8), np.zeros(8)).waste == 1, "a constant needs no codes"
    stretched = Ranges(np.r_[-7.0, even.low[1:]], np.r_[7.0, even.high[1:]])
    assert stretched.waste == pytest.approx(14 / (28 / 8))
    shifted = Ranges(even.low + np.arange(8), even.high + np.arange(8))
    assert shifted.waste == pytest.approx(9 / 2)


def test_pictures_show_the_rewrite_that_evens_the_channels_most(tmp_path: Path) -> None:
    onnx.save(vit(Sizes(width=16, hidden=24)), tmp_path / "vit.onnx")
    found = diagnose(tmp_path / "vit.onnx", samples=4, threads=1)
    titles = [picture.title for picture in found.pictures]
    assert len({title.partition(" of ")[0] for title in titles}) == len(titles) == len({r.role for r in found.tensors} - {"probs"})
    by_role = {title.partition(" of ")[0]: picture for title, picture in zip(titles, found.pictures, strict=True)}
    assert by_role["fc1 inputs"].rewrite in ("rotate-residual", "reparameterize-layernorm")
    assert by_role["fc1 inputs"].after.waste < by_role["fc1 inputs"].before.waste
    assert by_role["LayerNormalization inputs"].after.waste <= by_role["LayerNormalization inputs"].before.waste
    assert "pictures" not in json.loads(found.to_json())


@pytest.mark.plots
def test_a_file_is_drawn(tmp_path: Path) -> None:
    ranges = Ranges(np.arange(-6, 0.0), np.arange(1, 7.0))
    draw([Picture("k of attention 0", "center-keys", ranges, ranges)] * 2, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(PNG)
    with pytest.raises(OutputError, match=r"picture p\.docx: matplotlib writes .*png"):
        check_plots(Path("p.docx"))


@pytest.mark.plots
def test_the_command_draws(tmp_path: Path) -> None:
    onnx.save(vit(Sizes(width=16, hidden=24)), tmp_path / "vit.onnx")
    words = [str(tmp_path / "vit.onnx"), "--diagnose", "--samples", "4", "--threads", "1", "-q"]
    result = CliRunner().invoke(main, [*words, "--plot", str(tmp_path / "p.png")], catch_exceptions=False)
    assert (result.exit_code, result.output) == (0, "")
    assert (tmp_path / "p.png").read_bytes().startswith(PNG)
    result = CliRunner().invoke(main, [*words, "--plot", str(tmp_path / "vit.onnx")], catch_exceptions=False)
    assert result.exit_code == 2
    assert "is the model or the output" in result.output


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(OutputError, match=r"pictures need matplotlib: pip install 'vitq-compiler\[plots\]'"):
        check_plots(Path("p.png"))
