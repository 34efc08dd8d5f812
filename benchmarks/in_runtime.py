"""Runs graphs in the release of ONNX Runtime that its Python has; needs that and numpy alone.

Reads one line of JSON, ``{"graphs": {name: path}, "feed": "inputs.npz" or null, "rounds": 0}``, and prints one: the version, and of each
graph the error that it was refused with or stopped at, else an empty one. With ``rounds`` the first graph is the reference of the others:
SQNR of the first output in dB, median milliseconds on one thread, and the median of the ratios of the same round.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import onnxruntime as ort

TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64, "tensor(int32)": np.int32}


def main() -> None:
    """Answer one request."""
    request = json.loads(sys.stdin.readline())
    ort.set_default_logger_severity(4)
    feed = dict(np.load(request["feed"])) if request["feed"] else None
    sessions, found = {}, {}
    for name, path in request["graphs"].items():
        try:
            sessions[name] = load(path)
            outputs = sessions[name].run(None, feed or made_up(sessions[name]))
            found[name] = {"error": "", "output": outputs[0]}
        except Exception as error:  # of several private types
            found[name] = {"error": str(error).strip().splitlines()[0], "output": None}
    if request["rounds"] and feed is not None:
        measure({name: s for name, s in sessions.items() if not found[name]["error"]}, feed, request["rounds"], found)
    answer = {name: {key: item for key, item in row.items() if key != "output"} for name, row in found.items()}
    print(json.dumps({"version": ort.__version__, "graphs": answer}))


def load(path: str) -> ort.InferenceSession:
    """A session on one thread of the CPU."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def made_up(session: ort.InferenceSession) -> dict[str, Any]:
    """Ones for every input; what is open is 2."""
    return {i.name: np.ones([d if isinstance(d, int) else 2 for d in i.shape], TYPES[i.type]) for i in session.get_inputs()}


def measure(sessions: dict[str, ort.InferenceSession], feed: dict[str, Any], rounds: int, found: dict[str, dict[str, Any]]) -> None:
    """Add what is measured to ``found``; every round runs each session once, beginning with the next one."""
    names, seconds = list(sessions), np.zeros((rounds, len(sessions)))
    for step in range(rounds):
        for place in range(len(names)):
            index = (place + step) % len(names)
            began = time.perf_counter()
            sessions[names[index]].run(None, feed)
            seconds[step, index] = time.perf_counter() - began
    reference = found[names[0]]["output"].astype(np.float64)
    for index, name in enumerate(names):
        error = np.square(found[name]["output"].astype(np.float64) - reference).sum()
        found[name]["sqnr_db"] = float(10 * np.log10(np.square(reference).sum() / error)) if error else None
        found[name]["median_ms"] = float(np.median(seconds[:, index]) * 1e3)
        found[name]["ratio"] = float(np.median(seconds[:, index] / seconds[:, 0]))


if __name__ == "__main__":
    main()
