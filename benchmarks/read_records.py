"""Reading training faces from a record file: random access beside the decoding that follows it.

    python benchmarks/read_records.py                        # rendered faces
    python benchmarks/read_records.py data/casia-webface     # your own record file

- access: bytes of a random record, microseconds; the bar is 5.
- decoding: images a second of `source.image`, random order, beside PIL decoding the same bytes from a list in memory;
  the bar is 0.9 of it.

Rounds are interleaved, medians reported; one thread, processor time: the file lies in the page cache, and neither a
disk nor other programs count.
"""

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run by path, installed or not

from adaptface.data.records import RecordWriter, pack  # noqa: E402
from adaptface.data.sources import open_source  # noqa: E402
from adaptface.data.synthetic import draw_images, render  # noqa: E402


def write_example(path: Path, faces: int = 40, records: int = 20_000) -> Path:
    """A record file of rendered faces as JPEG, each of them many times over."""
    images = []
    for identity in range(faces):
        stream = io.BytesIO()
        Image.fromarray(render(identity, draw_images(identity, 1)[0], 112)).save(stream, "JPEG", quality=95)
        images.append(stream.getvalue())
    writer = RecordWriter(path)
    for key in range(records):
        writer.write(key, pack([key % faces], key, images[key % faces]))
    writer.close()
    return path


def seconds(work: Callable[[Any], Any], items: Sequence[Any]) -> float:
    """Seconds of processor time an item."""
    start = time.process_time()
    for item in items:
        work(item)
    return (time.process_time() - start) / len(items)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", help="a record file or its folder; default: rendered faces")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=1000, help="decoded a round")
    parser.add_argument("--output", type=Path, help="write everything as JSON")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        path = options.source or write_example(Path(folder) / "train.rec")
        written = time.perf_counter() - start
        start = time.perf_counter()
        source = open_source(path)
        opened = time.perf_counter() - start

        rng = np.random.default_rng(0)
        access, ours, raw = [], [], []
        for _ in range(options.rounds):
            order = rng.integers(0, len(source), 20 * options.images).tolist()
            access.append(seconds(source.encoded, order))
            order = order[: options.images]
            held = [source.encoded(index) for index in order]
            ours.append(seconds(source.image, order))
            raw.append(seconds(lambda image: Image.open(io.BytesIO(image)).convert("RGB"), held))
        del source
    result = {
        "data": str(options.source or "rendered faces (synthetic)"),
        "open_seconds": opened,
        "write_seconds": None if options.source else written,
        "access_us": 1e6 * statistics.median(access),
        "image_per_second": 1 / statistics.median(ours),
        "raw_per_second": 1 / statistics.median(raw),
        "decoding_ratio": statistics.median(theirs / mine for theirs, mine in zip(raw, ours, strict=True)),
    }
    print(f"{result['data']}: opened and checked in {opened:.2f} s")
    print(f"random access    {result['access_us']:.2f} us a record (bar: under 5)")
    ours, alone, ratio = (result[name] for name in ("image_per_second", "raw_per_second", "decoding_ratio"))
    print(f"random images    {ours:,.0f} a second; PIL alone {alone:,.0f}; ratio {ratio:.3f} (bar: at least 0.9)")
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
