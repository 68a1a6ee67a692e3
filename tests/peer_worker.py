"""The public libraries' side of `peers`, in a process of its own: one of them changes torch when it is imported.

A line of JSON in names a map and the files of its numbers, all float64; a line out says that the images are written.
Nothing of flowpost is imported here.
"""

from __future__ import annotations

import json
import os
import sys
import traceback

import numpy as np
import peer_networks
import peer_splines
import peer_steps
import torch

MAPS = peer_steps.MAPS | peer_networks.MAPS | peer_splines.MAPS


def main() -> None:
    """Answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    for line in sys.stdin:
        asked = json.loads(line)
        answer = "done"
        try:
            with np.load(asked["numbers"]) as numbers:
                arrays = {name: torch.from_numpy(numbers[name]) for name in numbers.files}
            with torch.no_grad():
                image, log_det = MAPS[asked["map"]](arrays, inverse=asked["inverse"])
            np.savez(asked["images"], image=image.numpy(), log_det=log_det.numpy())
        except Exception:  # noqa: BLE001 - whatever a library raises is told to the test
            answer = traceback.format_exc()
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
