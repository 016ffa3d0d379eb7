"""How fast and in how much memory folders of images are packed.

Speed: `packing.pack` beside a bare loop that opens each file, converts it to RGB, resizes it to 32x32 with Pillow and
drops it, on all cores (a process each). The two take turns, so that a noisy machine disturbs both; every file has
been read once before, so that neither pays for the disk.
Memory: the peak of a process that packs, and of the largest of its workers, for a folder of N and of 10 N images.

    python benchmarks/pack.py --folder data/tiny-imagenet-200/train          # JSON on standard output
    python benchmarks/pack.py --folder data/tiny-imagenet-200/train --memory 10000
"""
import argparse
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import layouts
import packing

REPEATS = 5


def bare(path):
    with Image.open(path) as image:
        image = image.convert("RGB")
        if image.size != (packing.IMAGE_SIZE, packing.IMAGE_SIZE):
            image = image.resize((packing.IMAGE_SIZE, packing.IMAGE_SIZE), Image.Resampling.BILINEAR)
        np.asarray(image)


def speed(folder, limit):
    """Images a second of the bare loop and of packing, and their ratio: medians of REPEATS rounds."""
    images = layouts.read_files(folder, layouts.list_images(folder)).limited(limit)
    paths = [os.path.join(folder, file) for file in images.files]
    for path in paths:
        Path(path).read_bytes()
    rounds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        with multiprocessing.get_context("fork").Pool(packing.cores()) as pool:
            for _ in pool.imap(bare, paths, chunksize=256):
                pass
        bare_seconds = time.perf_counter() - began
        with tempfile.TemporaryDirectory() as scratch:
            began = time.perf_counter()
            packing.pack(images, Path(scratch) / "pack", folder.name)
            seconds = time.perf_counter() - began
        rounds.append((len(paths) / bare_seconds, len(paths) / seconds, bare_seconds / seconds))
    found = [statistics.median(values) for values in zip(*rounds)]
    return {"folder": folder.name, "images": len(paths), "bare": round(found[0]), "pack": round(found[1]), "ratio": round(found[2], 3)}


def memory(folder, count):
    """Peak resident megabytes of a process that packs `count` images, and of its largest worker; the files of `folder`
    stand in for them under as many names as it takes."""
    files = layouts.list_images(folder)
    with tempfile.TemporaryDirectory() as scratch:
        many = Path(scratch) / "many"
        for i in range(count):
            place = many / f"{i // 1000:05}" / f"{i:08}{Path(files[0]).suffix}"
            place.parent.mkdir(parents=True, exist_ok=True)
            os.link(folder / files[i % len(files)], place) if os.stat(scratch).st_dev == os.stat(folder).st_dev else place.symlink_to(folder / files[i % len(files)])
        program = "import sys, benchmarks.pack as b; b.pack_and_tell(*sys.argv[1:])"
        told = subprocess.run([sys.executable, "-c", program, many, Path(scratch) / "data"], check=True, text=True, stdout=subprocess.PIPE,
                              cwd=Path(__file__).resolve().parent.parent)
    return {"images": count} | json.loads(told.stdout.splitlines()[-1])


def pack_and_tell(folder, data_dir):
    import data
    began = time.perf_counter()
    data.load_source(f"many={folder}", data_dir)
    seconds = time.perf_counter() - began
    peaks = [resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(json.dumps({"megabytes": round(peaks[0]), "megabytes_of_a_worker": round(peaks[1]), "seconds": round(seconds, 1)}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="a folder of images, at any depth")
    parser.add_argument("--images", type=int, help="at most so many of them, for the speed")
    parser.add_argument("--memory", type=int, metavar="N", help="measure the memory for N and for 10 N images instead")
    args = parser.parse_args()
    folder = args.folder.resolve()
    print(json.dumps([memory(folder, count) for count in (args.memory, 10 * args.memory)] if args.memory else speed(folder, args.images), indent=2))


if __name__ == "__main__":
    main()
