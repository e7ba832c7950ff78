"""See what each layer does to a few numbers that one can check by hand."""

import numpy as np

import numbanorm


def heading(text):
    print(f"\n{text}\n{'-' * len(text)}")


def difference(a, b):
    return f"largest difference {np.abs(a - b).max():.1e}"


def batch_norm():
    heading("BatchNorm: each column, over the batch")
    x = np.arange(9, dtype=np.float32).reshape(3, 3)
    print(f"{numbanorm.BatchNorm1d(3)} of\n{x}\nis\n{numbanorm.BatchNorm1d(3)(x)}")

    x = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    print(f"\n{numbanorm.BatchNorm1d(2)} of 0...11 as 2 samples, 2 channels, 3 steps is")
    print(numbanorm.BatchNorm1d(2)(x))


def layer_norm():
    heading("LayerNorm: each sample by itself")
    x = np.array([[2, 3, 5, 1, 4]], dtype=np.float32)
    y = numbanorm.LayerNorm([5])(x)
    print(f"{numbanorm.LayerNorm([5])} of\n{x}\nis\n{y}")
    # + 0.0 so that a rounding error below zero does not print as -0.0000.
    print(f"mean {y.mean().round(4) + 0.0:.4f}")
    print(f"variance {y.var():.4f} (divided by n), {y.var(ddof=1):.4f} (divided by n - 1)")


def group_norm(rng):
    heading("GroupNorm: between InstanceNorm and LayerNorm")
    x = rng.normal(size=(20, 6, 10, 10)).astype(np.float32)
    print(numbanorm.GroupNorm(3, 6), "on", x.shape)
    instance = numbanorm.InstanceNorm2d(6)(x)
    layer = numbanorm.LayerNorm([6, 10, 10], elementwise_affine=False)(x)
    print("GroupNorm(6, 6) against InstanceNorm2d(6):", end=" ")
    print(difference(numbanorm.GroupNorm(6, 6)(x), instance))
    print("GroupNorm(1, 6) against LayerNorm((6, 10, 10)) without parameters:", end=" ")
    print(difference(numbanorm.GroupNorm(1, 6)(x), layer))


def shapes(rng):
    heading("Shapes and parameters: y has the shape of x")
    for layer, shape in (
        (numbanorm.BatchNorm1d(100), (20, 100)),
        (numbanorm.BatchNorm1d(100, affine=False), (20, 100)),
        (numbanorm.BatchNorm2d(5), (20, 5, 10, 10)),
        (numbanorm.BatchNorm2d(100), (20, 100, 35, 45)),
        (numbanorm.BatchNorm2d(100, affine=False), (20, 100, 35, 45)),
        (numbanorm.LayerNorm(10), (20, 5, 10)),
        (numbanorm.LayerNorm([5, 10, 10]), (20, 5, 10, 10)),
        (numbanorm.InstanceNorm2d(100), (20, 100, 35, 45)),
        (numbanorm.InstanceNorm2d(100, affine=True), (20, 100, 35, 45)),
        (numbanorm.GroupNorm(3, 6), (20, 6, 10, 10)),
        (numbanorm.SwitchableNorm2d(6), (20, 6, 10, 10)),
    ):
        y = layer(rng.normal(size=shape).astype(np.float32))
        count = sum(p.size for p in layer.parameters().values())
        print(f"{layer}\n    {shape} -> {y.shape}, {count} parameters")


def main():
    rng = np.random.default_rng(0)
    with np.printoptions(formatter={"float": "{:7.4f}".format}):
        batch_norm()
        layer_norm()
        group_norm(rng)
        shapes(rng)


if __name__ == "__main__":
    main()
