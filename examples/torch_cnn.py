"""Train a small residual network in PyTorch before and after `numbanorm.torch.fuse`.

    python torch_cnn.py [--autocast] [--epochs 6] [--batch-size 64] [--width 16] [--size 32]
    python torch_cnn.py --benchmark

`fuse` puts numbanorm's layers into a model and has norm, addition and activation done in one pass
over memory. The data are the 1,797 digits that come with scikit-learn, scaled up; a quarter of them
is held out. Both networks start from the same weights, see the same batches and take turns, step by
step. With --autocast, both train in bfloat16, the weights staying float32.

With --benchmark, the network is four blocks of Conv3x3, norm and ReLU, 32 to 128 channels, on
random images of 32x3x32x32: BatchNorm of PyTorch and of numbanorm, and SwitchableNorm written
plainly in PyTorch, as its authors write it, and of numbanorm. Then a residual connection is added
to each block, and the whole fused, in float32 and bfloat16. A network without what is measured
takes turns with them: what a step takes longer than there is the time of it.
"""

import argparse
import copy
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import numbanorm.torch

# Distinct to colour-blind readers too (Okabe and Ito).
COLOURS = {"torch.nn": "#e69f00", "numbanorm.torch": "#0072b2"}
DTYPES = ("float32", "bfloat16")  # of --benchmark


class Residual(nn.Module):
    """Two convolutions, and the input added to what they make of it."""

    def __init__(self, channels, out, stride):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.skip = nn.Identity()
        if stride > 1 or channels != out:
            self.skip = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x):
        """Return the sum, rectified."""
        return F.relu(self.body(x) + self.skip(x))


def residual_network(width):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        Residual(width, width, 1),
        Residual(width, 2 * width, 2),
        Residual(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, 10),
    )


def plain_network(channels=(32, 64, 96, 128), residual=False):
    layers = []
    for before, after in zip((3, *channels), channels, strict=False):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        layers += [Residual(after, after, 1)] if residual else []
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], 10)
    )


class PlainSwitchableNorm2d(nn.Module):
    """SwitchableNorm as its definition reads, without running statistics."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))
        self.mean_weight = nn.Parameter(torch.ones(3))
        self.var_weight = nn.Parameter(torch.ones(3))

    def statistics(self, x):
        """Return the means and variances of instances, layers and the batch."""
        axes = (2, 3), (1, 2, 3), (0, 2, 3)
        means = [x.mean(a, keepdim=True) for a in axes]
        return means, [x.var(a, correction=0, keepdim=True) for a in axes]

    def forward(self, x):
        """Return x normalised with the mixture of the statistics."""
        means, variances = self.statistics(x)
        mean = sum(p * m for p, m in zip(self.mean_weight.softmax(0), means, strict=True))
        var = sum(p * v for p, v in zip(self.var_weight.softmax(0), variances, strict=True))
        return (x - mean) / (var + 1e-5).sqrt() * self.weight + self.bias


class AuthorsSwitchableNorm2d(PlainSwitchableNorm2d):
    """The same as its authors write it: layers and the batch from the instances' statistics."""

    def statistics(self, x):
        """Return the means and variances of instances, layers and the batch."""
        mean, var = x.mean((2, 3), keepdim=True), x.var((2, 3), correction=0, keepdim=True)
        square = var + mean**2
        means = [mean, mean.mean(1, keepdim=True), mean.mean(0, keepdim=True)]
        squares = [square, square.mean(1, keepdim=True), square.mean(0, keepdim=True)]
        return means, [s - m**2 for s, m in zip(squares, means, strict=True)]


def replace(module, kind, make):
    """Put `make(child)` into the place of each child of a kind; return the module."""
    for name, child in module.named_children():
        if isinstance(child, kind):
            setattr(module, name, make(child))
        else:
            replace(child, kind, make)
    return module


def replace_norms(module, make):
    """Put `make(channels)` into the place of each BatchNorm; return the module."""
    return replace(module, nn.BatchNorm2d, lambda norm: make(norm.num_features))


def convolutions_alone(module):
    """Leave out norms, activations and additions; return the module."""
    replace(module, Residual, lambda block: block.body)
    return replace(module, nn.BatchNorm2d | nn.ReLU, lambda _: nn.Identity())


class Trainer:
    """A network and its optimiser; `losses` and `seconds` have one entry for each step."""

    def __init__(self, model, rate, autocast=False):
        self.model = model
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
        self.optimiser = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
        self.losses, self.seconds = [], []

    def step(self, images, labels, rate=None):
        """Train on one batch, and note the loss and how long it took."""
        start = perf_counter()
        if rate is not None:
            self.optimiser.param_groups[0]["lr"] = rate
        self.optimiser.zero_grad()
        with self.autocast:
            loss = F.cross_entropy(self.model(images), labels)
        loss.backward()
        self.optimiser.step()
        self.losses.append(loss.item())
        self.seconds.append(perf_counter() - start)

    @torch.no_grad()
    def accuracy(self, images, labels):
        """Return the share of images that the network, in evaluation, is right about."""
        self.model.eval()
        with self.autocast:
            parts = [self.model(batch).argmax(1) for batch in images.split(256)]
        return (torch.cat(parts) == labels).float().mean().item()


def take_turns(trainers, *batch, rate=None):
    """Let each network do one step; who is first changes, as what runs before has an effect."""
    names = list(trainers)
    first = len(trainers[names[0]].seconds) % len(names)
    for name in names[first:] + names[:first]:
        trainers[name].step(*batch, rate)


def trainers_of(models, rate, autocast, *batch):
    """Return a trainer for each network, after Numba has compiled what a step needs."""
    for model in models.values():
        Trainer(copy.deepcopy(model), 0.0, autocast).step(*batch)
    return {name: Trainer(model, rate, autocast) for name, model in models.items()}


def added(trainers, name, without):
    """Return how many seconds longer a step is, the median over all turns."""
    return np.median(np.subtract(trainers[name].seconds, trainers[without].seconds))


def median(trainers, name):
    return np.median(trainers[name].seconds)


# -- Digits --------------------------------------------------------------------------------------


def digits(size, seed):
    """Return images and labels for training, then for testing."""
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images.reshape(-1, 1, 8, 8) / 16, dtype=torch.float32)
    images = F.interpolate(images, size=size, mode="bilinear")
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.25, stratify=labels, random_state=seed
    )
    labels = torch.tensor(labels)
    return images[train], labels[train], images[test], labels[test]


def train(args):
    """Train both networks; return them, and a row for each."""
    images, labels, test_images, test_labels = digits(args.size, args.seed)
    torch.manual_seed(args.seed)
    model = residual_network(args.width)
    models = {
        "torch.nn": model,
        "numbanorm.torch": numbanorm.torch.fuse(copy.deepcopy(model)),
    }
    first = images[: args.batch_size], labels[: args.batch_size]
    trainers = trainers_of(models, 0.0, args.autocast, *first)
    batches = -(-len(images) // args.batch_size)
    steps = args.epochs * batches
    generator = np.random.default_rng(args.seed)
    with tqdm(total=steps, unit="step") as progress:
        for _ in range(args.epochs):
            for batch in np.array_split(generator.permutation(len(images)), batches):
                rate = 0.02 * (1 - progress.n / steps)
                take_turns(trainers, images[batch], labels[batch], rate=rate)
                progress.update()
    rows = {}
    for name, trainer in trainers.items():
        accuracy = trainer.accuracy(test_images, test_labels)
        losses = np.reshape(trainer.losses, (args.epochs, batches)).mean(1)
        rows[name] = accuracy, losses, 1e3 * median(trainers, name)
    return trainers, rows


def table(rows):
    """Return accuracies and times as text, then the losses of the epochs side by side."""
    lines = ["                     test   a step"]
    lines += ["norm layers      accuracy       ms"]
    for name, (accuracy, _, milliseconds) in rows.items():
        lines.append(f"{name:<16}{accuracy:>9.4f}{milliseconds:>9.1f}")
    lines += ["", "loss of epoch" + "".join(f"{name:>17}" for name in rows)]
    for epoch, losses in enumerate(zip(*(row[1] for row in rows.values()), strict=True), 1):
        lines.append(f"{epoch:>13}" + "".join(f"{loss:>17.5f}" for loss in losses))
    return "\n".join(lines)


def plot(trainers, rows, path):
    # Not pyplot: a figure of its own needs no display.
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for name, width, style in (("torch.nn", 4, "-"), ("numbanorm.torch", 1.5, "--")):
        losses = trainers[name].losses
        steps = np.arange(1, len(losses) + 1)
        left.semilogy(steps, losses, style, color=COLOURS[name], linewidth=width, label=name)
    left.set(title="The same training", xlabel="step", ylabel="cross-entropy of the batch")
    left.legend(frameon=False)
    for name, (_, _, milliseconds) in rows.items():
        right.barh(name, milliseconds, color=COLOURS[name])
        right.text(milliseconds, name, f" {milliseconds:.1f}", va="center")
    right.set(title="A step", xlabel="milliseconds")
    right.margins(x=0.15)
    right.invert_yaxis()
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


# -- Benchmark -----------------------------------------------------------------------------------


def benchmark(args):
    """Print how long each network's step is; return the figures that matter."""
    torch.manual_seed(args.seed)
    batch = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
    model, residual, ours = plain_network(), plain_network(residual=True), numbanorm.torch
    norms = {
        "BatchNorm": {"PyTorch": nn.BatchNorm2d, "numbanorm": ours.BatchNorm2d},
        "SwitchableNorm": {
            "plain PyTorch": PlainSwitchableNorm2d,
            "as its authors": AuthorsSwitchableNorm2d,
            "numbanorm": ours.SwitchableNorm2d,
        },
    }
    groups = {
        norm: {
            name: replace_norms(copy.deepcopy(model), make)
            for name, make in ({"without": lambda channels: nn.Identity()} | makers).items()
        }
        for norm, makers in norms.items()
    }
    for dtype in DTYPES:
        groups[f"norm, add, ReLU in {dtype}"] = {
            "without": convolutions_alone(copy.deepcopy(residual)),
            "PyTorch": residual,
            "numbanorm": ours.fuse(copy.deepcopy(residual)),
        }
    print(f"{torch.get_num_threads()} threads, {args.steps} rounds, medians")
    print(f"{'':<44}{'a step, ms':>12}{'added, ms':>12}")
    results = {}
    # Not all at once: memory that a plain SwitchableNorm leaves behind spares others fresh pages.
    for group, models in groups.items():
        trainers = trainers_of(copy.deepcopy(models), 0.01, group.endswith("bfloat16"), *batch)
        for _ in tqdm(range(args.steps), unit="round"):
            take_turns(trainers, *batch)
        step = {name: median(trainers, name) for name in models}
        extra = {name: added(trainers, name, "without") for name in models}
        for name in models:
            print(f"{f'{group}, {name}':<44}{1e3 * step[name]:>12.1f}{1e3 * extra[name]:>12.1f}")
        mine, theirs = "numbanorm", list(models)[1]
        results[f"what {group} adds, {mine} / {theirs}"] = extra[mine] / extra[theirs]
        results[f"a step with {group}, {mine} / {theirs}"] = step[mine] / step[theirs]
        expected, found = (np.array(trainers[name].losses) for name in (theirs, mine))
        results[f"losses, {group}"] = (np.abs(found - expected) / expected).max()
    for what, figure in results.items():
        print(f"{what}: {figure:.1e}" if what.startswith("losses") else f"{what}: {figure:.3f}")
    return results


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--benchmark", action="store_true", help="measure, on random images")
    parser.add_argument("--autocast", action="store_true", help="train in bfloat16")
    parser.add_argument("--steps", type=positive, default=50, help="of --benchmark, default: 50")
    parser.add_argument("--epochs", type=positive, default=6, help="default: 6")
    parser.add_argument("--batch-size", type=positive, default=64, help="default: 64")
    parser.add_argument("--width", type=positive, default=16, help="channels, default: 16")
    parser.add_argument("--size", type=positive, default=32, help="of an image, default: 32")
    parser.add_argument("--threads", type=positive, help="default: as PyTorch has it")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("torch_cnn.png"),
        help="where the figure goes, default: torch_cnn.png",
    )
    args = parser.parse_args(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)  # numbanorm follows
    if args.benchmark:
        return benchmark(args)
    trainers, rows = train(args)
    print(table(rows))
    plot(trainers, rows, args.output)
    print(f"Figure: {args.output}")
    return trainers


if __name__ == "__main__":
    main()
