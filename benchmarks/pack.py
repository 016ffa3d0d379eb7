"""How fast and in how much memory folders of images are packed.

The speed stands beside a bare loop that opens each file, converts it to RGB, resizes it to 32x32
with Pillow and drops it, on all cores. Every file has been read before.

    python benchmarks/pack.py                                       # JPEGs that it makes
    python benchmarks/pack.py --folder data/tiny-imagenet-200/train
"""
import multiprocessing
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from benchmarks import measuring
from kd.packing import cores, pack
from kd.readers import list_images, read_files
from kd.settings import resolve


def bare(path):
    with Image.open(path) as image:
        image = image.convert("RGB")
        if image.size != (32, 32):
            image = image.resize((32, 32), Image.Resampling.BILINEAR)
        np.asarray(image)


def bare_loop(paths):
    with multiprocessing.get_context("fork").Pool(cores()) as pool:
        for _ in pool.imap(bare, paths, chunksize=256):
            pass


def packing(images):
    with tempfile.TemporaryDirectory() as folder:
        pack(images, Path(folder) / "pack", "speed", 32, 0.01)


def memory(folder):
    settings = resolve({"target": "digits", "data_dir": str(folder.parent / "data")})
    before = measuring.peaks()[0]
    took = measuring.seconds(data.load_source, settings, f"many={folder}")
    return [folder.name, took, before, *measuring.peaks()]


def main():
    args = measuring.arguments(__doc__, folder=None)
    sizes, rounds = ((100, 1_000), 1) if args.trial else ((10_000, 100_000), 5)
    with tempfile.TemporaryDirectory() as scratch:
        made = [measuring.write_jpegs(Path(scratch) / str(count), count) for count in sizes]
        folder = Path(args.folder or made[-1])
        images = read_files(folder, list_images(folder))
        paths = [folder / file for file in images.files]
        for path in paths:
            path.read_bytes()
        bare, ours = measuring.taking_turns({
            "bare": lambda: len(paths) / measuring.seconds(bare_loop, paths),
            "pack": lambda: len(paths) / measuring.seconds(packing, images)}, rounds).values()
        rows = [measuring.in_a_process(memory, each) for each in made]
    measuring.table(f"Images per second, of {len(paths):,}, medians", ["bare", "pack", "ratio"],
                    [map(np.median, (bare, ours, ours / bare))])
    measuring.table("Memory", ["images", "s", "MiB before", "MiB", "MiB of a worker"], rows)


if __name__ == "__main__":
    main()
