"""The univariate sets of NIST's Statistical Reference Datasets, whole and merged from pieces.

https://www.itl.nist.gov/div898/strd/univ/homepage.html

Results are compared with exact rational arithmetic on the stored doubles: 1000000.1 is rounded
when it becomes one, so that NIST's decimals themselves can be met to 9.4 digits in NumAcc3 and to
8.2 in NumAcc4.
"""

import math
from fractions import Fraction

import numpy as np
import pytest

import numbanorm as nn
from numbanorm import Moments


def pi_digits(n):
    """Take the first n digits of pi from Machin's formula, 16 atan(1/5) - 4 atan(1/239)."""
    guard = 10
    one = 10 ** (n - 1 + guard)

    def arctan_of_inverse(k):
        power = total = one // k
        odd = 1
        while abs(power) > 1:
            power //= -k * k
            odd += 2
            total += power // odd
        return total

    pi = (16 * arctan_of_inverse(5) - 4 * arctan_of_inverse(239)) // 10**guard
    found = []
    for _ in range(n):
        pi, digit = divmod(pi, 10)
        found.append(digit)
    return found[::-1]


def alternating(first, low, high):
    return [first] + [low, high] * 500


# The speed of light by Michelson, 1879, in km/s over 299000; the transmittance of a filter, in
# 1e-5 over 2; the deflection of a steel-concrete beam; three-digit lottery numbers.
MICHELSO = """
850 740 900 1070 930 850 950 980 980 880 1000 980 930 650 760 810 1000 1000 960 960 960 940 960
940 880 800 850 880 900 840 830 790 810 880 880 830 800 790 760 800 880 880 880 860 720 720 620
860 970 950 880 910 850 870 840 840 850 840 840 840 890 810 810 820 800 770 760 740 750 760 910
920 890 860 880 720 840 850 850 780 890 840 780 810 760 810 790 810 820 850 870 870 810 740 810
940 950 800 810 870
"""
MAVRO = """
180 170 180 190 180 170 150 140 150 150 170 180 180 190 190 210 200 160 140 130 130 150 150 160
150 140 130 140 150 140 150 160 150 160 190 200 200 210 220 230 240 250 270 260 260 260 270 260
250 240
"""
LEW = """
-213 -564 -35 -15 141 115 -420 -360 203 -338 -431 194 -220 -513 154 -125 -559 92 -21 -579 -52 99
-543 -175 162 -457 -346 204 -300 -474 164 -107 -572 -8 83 -541 -224 180 -420 -374 201 -236 -531
83 27 -564 -112 131 -507 -254 199 -311 -495 143 -46 -579 -90 136 -472 -338 202 -287 -477 169 -124
-568 17 48 -568 -135 162 -430 -422 172 -74 -577 -13 92 -534 -243 194 -355 -465 156 -81 -578 -64
139 -449 -384 193 -198 -538 110 -44 -577 -6 66 -552 -164 161 -460 -344 205 -281 -504 134 -28 -576
-118 156 -437 -381 200 -220 -540 83 11 -568 -160 172 -414 -408 188 -125 -572 -32 139 -492 -321 205
-262 -504 142 -83 -574 0 48 -571 -106 137 -501 -266 190 -391 -406 194 -186 -553 83 -13 -577 -49
103 -515 -280 201 300 -506 131 -45 -578 -80 138 -462 -361 201 -211 -554 32 74 -533 -235 187 -372
-442 182 -147 -566 25 68 -535 -244 194 -351 -463 174 -125 -570 15 72 -550 -190 172 -424 -385 198
-218 -536 96
"""
LOTTERY = """
162 671 933 414 788 730 817 33 536 875 670 236 473 167 877 980 316 950 456 92 517 557 956 954 104
178 794 278 147 773 437 435 502 610 582 780 689 562 964 791 28 97 848 281 858 538 660 972 671 613
867 448 738 966 139 636 847 659 754 243 122 455 195 968 793 59 730 361 574 522 97 762 431 158 429
414 22 629 788 999 187 215 810 782 47 34 108 986 25 644 829 630 315 567 919 331 207 412 242 607
668 944 749 168 864 442 533 805 372 63 458 777 416 340 436 140 919 350 510 572 905 900 85 389 473
758 444 169 625 692 140 897 672 288 312 860 724 226 884 508 976 741 476 417 831 15 318 432 241 114
799 955 833 358 935 146 630 830 440 642 356 373 271 715 367 393 190 669 8 861 108 795 269 590 326
866 64 523 862 840 219 382 998 4 628 305 747 247 34 747 729 645 856 974 24 568 24 694 608 480 410
729 947 293 53 930 223 203 677 227 62 455 387 318 562 242 428 968
"""


def integers(text):
    return np.array(text.split(), np.int64)


PI = pi_digits(5000)
PI[956] = 3  # an 8 in truth; NIST's file has a 3, and the certified values are of the file

SETS = {
    "PiDigits": PI,
    "Lottery": integers(LOTTERY),
    "Lew": integers(LEW),
    # A quotient of integers is the double next to the decimal that NIST prints.
    "Mavro": (200_000 + integers(MAVRO)) / 100_000,
    "Michelso": (299_000 + integers(MICHELSO)) / 1000,
    "NumAcc1": [10_000_001, 10_000_003, 10_000_002],
    "NumAcc2": alternating(1.2, 1.1, 1.3),
    "NumAcc3": alternating(1_000_000.2, 1_000_000.1, 1_000_000.3),
    "NumAcc4": alternating(10_000_000.2, 10_000_000.1, 10_000_000.3),
}
SETS = {name: np.asarray(values, np.float64) for name, values in SETS.items()}

# Count, mean and standard deviation as certified, and to how many digits the deviation of the
# doubles agrees with it.
CERTIFIED = {
    "PiDigits": (5000, "4.53480000000000", "2.86733906028871", 14),
    "Lottery": (218, "518.958715596330", "291.699727470969", 14),
    "Lew": (200, "-177.435000000000", "277.332168044316", 14),
    "Mavro": (50, "2.00185600000000", "0.000429123454003053", 13),
    "Michelso": (100, "299.852400000000", "0.0790105478190518", 13.5),
    "NumAcc1": (3, "10000002", "1", 15),
    "NumAcc2": (1001, "1.2", "0.1", 15),
    "NumAcc3": (1001, "1000000.2", "0.1", 9.4),
    "NumAcc4": (1001, "10000000.2", "0.1", 8.2),
}

every_set = pytest.mark.parametrize("name", SETS)


def exact(x):
    """Take mean and sample standard deviation of doubles as fractions."""
    values = [Fraction(float(v)) for v in x]
    mean = sum(values) / len(values)
    return mean, root(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


def root(value):
    """Take the square root of a fraction, to 40 decimals."""
    return Fraction(math.isqrt(value.numerator * 10**80 // value.denominator), 10**40)


def digits(actual, expected):
    """Count the right decimal digits: minus the logarithm of the relative error, at most 17."""
    expected = Fraction(expected)
    error = abs(Fraction(np.asarray(actual).item()) - expected) / abs(expected)
    return -math.log10(max(error, Fraction(1, 10**17)))


EXACT = {name: exact(x) for name, x in SETS.items()}


# -- one pass ------------------------------------------------------------------------------------


@every_set
def test_the_sets_are_those_of_nist(name):
    count, mean, std, right = CERTIFIED[name]
    assert len(SETS[name]) == count
    assert digits(EXACT[name][0], mean) >= 14
    assert digits(EXACT[name][1], std) >= right


@every_set
@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x,
        lambda x: x[::-1],
        lambda x: np.repeat(x, 2)[::2],
        lambda x: x.reshape(1, -1),
        lambda x: x.reshape(-1, 1),
        lambda x: x.reshape(-1, 1, 1),
    ],
    ids=["", "backwards", "every second", "a row", "a column", "three axes"],
)
def test_one_pass(name, layout):
    mean, std = EXACT[name]
    got = nn.moments(layout(SETS[name]))
    assert got.count == len(SETS[name])
    assert digits(got.mean, mean) >= 15
    assert digits(got.std(ddof=1), std) >= 14


@every_set
def test_one_pass_among_others(name):
    """As one of several columns, and as one of several rows, others far away."""
    x, (mean, std) = SETS[name], EXACT[name]
    columns = np.stack([np.zeros_like(x), x, np.linspace(-1e9, 1e9, len(x))], axis=1)
    for got in (nn.moments(columns, 0), nn.moments(np.ascontiguousarray(columns.T), 1)):
        assert digits(got.mean[1], mean) >= 15
        assert digits(got.std(ddof=1)[1], std) >= 14


@every_set
def test_one_pass_masked(name):
    """Elements that do not count stand between those that do, first of all one far away."""
    mean, std = EXACT[name]
    x = np.repeat(SETS[name], 2)
    x[::2] = -1e30
    mask = np.arange(x.size) % 2 == 1
    for got in (nn.moments(x, mask=mask), nn.moments(x[:, None], 0, mask=mask[:, None])):
        assert got.count == len(SETS[name])
        assert digits(got.mean, mean) >= 15
        assert digits(got.std(ddof=1), std) >= 14


@every_set
def test_running_statistics(name):
    x, (mean, std) = SETS[name], EXACT[name]
    layer = nn.BatchNorm1d(1, momentum=1.0, dtype=np.float64)
    layer(x[:, None])
    assert digits(layer.running_mean[0], mean) >= 15
    assert digits(np.sqrt(layer.running_var[0]), std) >= 14


# -- merged from pieces --------------------------------------------------------------------------

# Where a mean is rounded to float64 in each merge, it is off by up to 1e-8 of the deviations in
# NumAcc4; so much is asked for, but a mean kept in two parts has 14 digits everywhere.
MERGED_DIGITS = {"Mavro": 11.5, "NumAcc3": 10.5, "NumAcc4": 9.0}


def split(x, n_pieces, rng):
    """Cut x into pieces of random lengths, at least 1 each."""
    cuts = rng.choice(np.arange(1, len(x)), n_pieces - 1, replace=False)
    return [nn.moments(piece) for piece in np.split(x, np.sort(cuts))]


def merged_by_a_tree(parts, rng):
    """Add two random parts until one is left."""
    parts = list(parts)
    while len(parts) > 1:
        a, b = (parts.pop(rng.integers(len(parts))) for _ in range(2))
        parts.append(a + b)
    return parts[0]


MERGES = {
    "merge": lambda parts, rng: Moments.merge(iter(parts)),
    "merge in random order": lambda parts, rng: Moments.merge(rng.permutation(parts)),
    "one after the other": lambda parts, rng: sum(parts, Moments.empty()),
    "from the last": lambda parts, rng: sum(parts[::-1], Moments.empty()),
    "a random tree": merged_by_a_tree,
}
ORDERS = {
    "as it is": lambda x, rng: x,
    "shuffled": lambda x, rng: rng.permutation(x),
    "sorted": lambda x, rng: np.sort(x),
}


@every_set
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("how", MERGES)
def test_merged_in_any_split_and_order(name, order, how):
    x, (mean, std) = SETS[name], EXACT[name]
    rng = np.random.default_rng([*name.encode(), *order.encode()])
    several = {min(n, len(x)) for n in (2, 3, 7, 50)}
    for n_pieces in [*np.repeat(sorted(several), 10), min(len(x), 1001)]:
        got = MERGES[how](split(ORDERS[order](x, rng), n_pieces, rng), rng)
        assert got.count == len(x)
        assert digits(got.mean, mean) >= 14
        right = digits(got.std(ddof=1), std)
        assert right >= MERGED_DIGITS.get(name, 13), f"{n_pieces} pieces: {right:.2f} digits"


@every_set
def test_merged_from_scattered_pieces(name):
    """Each piece is a random choice of elements, by a mask."""
    x, (mean, std) = SETS[name], EXACT[name]
    rng = np.random.default_rng(0)
    for n_pieces in (2, 3, 20):
        owner = rng.integers(n_pieces, size=len(x))
        got = Moments.merge(nn.moments(x, mask=owner == k) for k in range(n_pieces))
        assert got.count == len(x)
        assert digits(got.mean, mean) >= 14
        assert digits(got.std(ddof=1), std) >= MERGED_DIGITS.get(name, 13)


@every_set
def test_recalibrated(name):
    """The pooled statistics of a layer are as good as merged moments."""
    x, (mean, std) = SETS[name], EXACT[name]
    layer = nn.BatchNorm1d(1, dtype=np.float64)
    half = len(x) // 2
    batches = [x[:half], x[half:]] if half > 1 else [x]
    nn.recalibrate(layer, [batch[:, None] for batch in batches], [layer])
    assert digits(layer.running_mean[0], mean) >= 14
    assert digits(np.sqrt(layer.running_var[0]), std) >= MERGED_DIGITS.get(name, 13)


# -- many sets at once, of any shape and of counts that differ -----------------------------------


def together(shape):
    """Put sets side by side as columns of (5000, *shape), shorter ones filled with junk."""
    names = [name for _, name in zip(range(math.prod(shape)), SETS, strict=False)]
    x = np.full((5000, len(names)), np.nan)
    for column, name in enumerate(names):
        x[: len(SETS[name]), column] = SETS[name]
    return names, x.reshape(5000, *shape), np.isfinite(x).reshape(5000, *shape)


@pytest.mark.parametrize("shape", [(), (9,), (3, 3), (2, 1, 4)], ids=str)
@pytest.mark.parametrize("n_pieces", [1, 2, 13])
def test_many_sets_at_once(shape, n_pieces):
    names, x, mask = together(shape)
    cuts = np.sort(np.random.default_rng(0).choice(5000, n_pieces - 1, replace=False))
    pieces = zip(np.split(x, cuts), np.split(mask, cuts), strict=True)
    # Most sets end in the first piece: their counts differ, and later ones are empty.
    got = Moments.merge(nn.moments(part, 0, mask=counts) for part, counts in pieces)
    assert got.mean.shape == got.m2.shape == np.shape(got.count) == shape
    results = (np.ravel(v) for v in (got.count, got.mean, got.std(ddof=1), got.std(), got.var(2)))
    for name, count, mean, std, biased, var in zip(names, *results, strict=True):
        n, least = len(SETS[name]), 14 if n_pieces == 1 else MERGED_DIGITS.get(name, 13)
        assert count == n
        assert digits(mean, EXACT[name][0]) >= 14
        assert digits(std, EXACT[name][1]) >= least
        assert digits(biased, EXACT[name][1] * root(Fraction(n - 1, n))) >= least
        assert digits(var, EXACT[name][1] ** 2 * Fraction(n - 1, n - 2)) >= least - 0.5


@every_set
def test_nothing_more_changes_nothing(name):
    whole = nn.moments(SETS[name])
    nothing = [Moments.empty(), nn.moments(SETS[name][:0]), nn.moments([1e30], mask=[False])]
    for empty in nothing:
        for got in (whole + empty, empty + whole, Moments.merge([empty, whole, *nothing])):
            assert got.count == whole.count
            np.testing.assert_array_equal(got.mean, whole.mean)
            np.testing.assert_array_equal(got.m2, whole.m2)
