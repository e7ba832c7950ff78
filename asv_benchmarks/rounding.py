"""The largest error of y and dx of 16 bits, beside PyTorch's, in units in the last place.

    python asv_benchmarks/rounding.py [--dtype bfloat16]

The data have standard deviation 2 and an offset; the exact results are those of plain NumPy in
float64 for the same 16 bits. Rounding those would give 0.5. Around zero, a unit is that of 1.
A cell has numbanorm, PyTorch with weights of 32 bits, and PyTorch with weights of 16 bits.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import cases
import plain

OFFSETS = (0, 10, 100)
LAYERS = ("batch", "instance", "group", "switchable", "layer", "rms")
DIGITS = {"float16": 10, "bfloat16": 7}  # of the mantissa


def case_of(layer: str, layout: str, dtype: str, offset: float) -> cases.Case:
    """Return a case of small images, or of rows."""
    if layer in ("layer", "rms"):
        return cases.Case(layer, cases.ROWS["narrow"], "last", dtype, offset=offset)
    shape = cases.IMAGES["small 32x32"]
    shape = shape if layout == "first" else cases.channels_last(shape)
    return cases.Case(layer, shape, layout, dtype, offset=offset)


def largest_error(case: cases.Case, runner: cases.Runner) -> float:
    """Return the largest error of y and dx of how a library does a case."""
    exact = plain.runner(case, "float64")
    found = []
    for phase in ("train", "backward"):
        expected = getattr(exact, phase)()
        result = runner.array(getattr(runner, phase)()).astype("float64")
        _, exponent = np.frexp(np.maximum(np.abs(expected), 1))
        ulp = np.ldexp(1.0, exponent - 1 - DIGITS[case.dtype])
        found.append(float((np.abs(result - expected) / ulp).max()))
    return max(found)


def main(arguments: list[str] | None = None) -> dict[str, list[list[float]]]:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--dtype", choices=cases.HALF, default=cases.HALF[0])
    dtype = parser.parse_args(arguments).dtype
    print("| layer | channels | " + " | ".join(f"at {offset}" for offset in OFFSETS) + " |")
    print("|---" * (2 + len(OFFSETS)) + "|")
    table = {}
    for layer in LAYERS:
        for layout in ("last",) if layer in ("layer", "rms") else ("first", "last"):
            row = []
            for offset in OFFSETS:
                case = case_of(layer, layout, dtype, offset)
                runners = [cases.numbanorm_runner(case)]
                runners += [cases.torch_runner(case, half_weights=half) for half in (False, True)]
                row.append([largest_error(case, runner) for runner in runners])
            table[f"{layer} {layout}"] = row
            cells = (", ".join(f"{error:.2f}" for error in errors) for errors in row)
            print(f"| {layer} | {layout} | " + " | ".join(cells) + " |", flush=True)
    return table


if __name__ == "__main__":
    main()
