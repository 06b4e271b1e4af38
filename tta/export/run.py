"""Predict a folder of images, adapting as they come, without torch.

    python run.py IMAGES [--batch 8] [--state FILE.npz]

It needs numpy and onnxruntime, and Pillow unless the images are .npy arrays (C, H, W) of what the
model takes. It prints a line of JSON for each. With --state it goes on from that file, if it is
there, and leaves the state in it.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

HERE, KINDS = Path(__file__).parent, (".npy", ".png", ".jpg", ".jpeg", ".bmp", ".webp")


def read(path: Path, shape: tuple[int, ...], meta: dict[str, str]) -> np.ndarray:
    """One image (C, H, W) as the model takes it."""
    if path.suffix == ".npy":
        return np.load(path)
    from PIL import Image, ImageOps

    picture = ImageOps.fit(Image.open(path).convert("RGB"), (shape[2], shape[1]))
    mean, std = (np.array(json.loads(meta[key]), np.float32) for key in ("mean", "std"))
    return ((np.asarray(picture, np.float32) / 255 - mean) / std).transpose(2, 0, 1)


def main() -> None:
    """Run the command line."""
    import onnxruntime

    parser = argparse.ArgumentParser(description="Predict a folder of images.")
    parser.add_argument("images", type=Path, help="a folder")
    parser.add_argument("--batch", type=int, default=1, help="images at once")
    parser.add_argument("--state", type=Path, help="where to go on, and to leave the state")
    args = parser.parse_args()
    session: Any = onnxruntime.InferenceSession(str(HERE / "model.onnx"))
    meta, shape = session.get_modelmeta().custom_metadata_map, session.get_inputs()[0].shape[1:]
    old = bool(args.state and args.state.is_file())
    begin: Any = args.state if old else HERE / "state.npz"
    state: Any = dict(np.load(begin))
    files = sorted(path for path in args.images.iterdir() if path.suffix.lower() in KINDS)
    for at in range(0, len(files), args.batch):
        some = files[at : at + args.batch]
        feeds = {"images": np.stack([read(path, shape, meta) for path in some]).astype(np.float32)}
        feeds["reset"] = np.array([at == 0 and not old])
        logits, *after = session.run(None, feeds | state)
        state = {f"state_in_{i}": value for i, value in enumerate(after)}
        for path, row in zip(some, np.exp(logits - logits.max(1, keepdims=True)), strict=True):
            found = {"file": path.name, "class": int(row.argmax())}
            print(json.dumps(found | {"probability": round(float(row.max() / row.sum()), 4)}))
    if args.state is not None:
        np.savez(args.state, **state)


if __name__ == "__main__":
    main()
