"""Runs an exported graph by onnxruntime alone, and says what it took; started as a script.

    python edge_process.py MODEL.onnx STATE.npz CALLS SHAPE

STATE.npz need not be there. It prints a line of JSON: seconds of each call by the clock and of the
processor, bytes of the process in memory at its peak and before the graph was loaded, and the
modules of torch that were imported, which are none.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

WARM_UP = 5  # calls that are not timed
KILO = 1024


def memory(field: str) -> int:
    """Bytes, from the system's account of this process: VmHWM is the peak, VmRSS what is now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * KILO
    return 0


def main() -> None:
    """Measure."""
    import numpy as np
    import onnxruntime

    model, start, calls, shape = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    before = memory("VmRSS")
    options: Any = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session: Any = onnxruntime.InferenceSession(model, options)
    draws = np.random.default_rng(0)
    sizes = tuple(int(n) for n in shape.split("x"))
    batches = [draws.standard_normal(sizes, dtype=np.float32) for _ in range(4)]
    adapts = start.is_file()
    state: dict[str, Any] = dict(np.load(start)) if adapts else {}
    clock, processor = [], []
    for t in range(WARM_UP + calls):
        feeds = {"images": batches[t % len(batches)], **state}
        if adapts:
            feeds["reset"] = np.array([t == 0])
        begun = time.perf_counter(), time.thread_time()
        _, *after = session.run(None, feeds)
        ended = time.perf_counter(), time.thread_time()
        state = {f"state_in_{i}": value for i, value in enumerate(after)}
        if t >= WARM_UP:
            clock.append(ended[0] - begun[0])
            processor.append(ended[1] - begun[1])
    torch = sorted(name for name in sys.modules if name.partition(".")[0] == "torch")
    figures = {"clock": clock, "processor": processor, "before": before, "peak": memory("VmHWM")}
    print(json.dumps(figures | {"torch": torch}))


if __name__ == "__main__":
    main()
