"""The few layers around a norm layer, in NumPy: enough to train a small convolutional network.

Each of them speaks the protocol of the layers in numbanorm, so a norm layer stands in a
`Sequential` as it is: ``y = layer(x)``, ``dx = layer.backward(dy)``, ``parameters()`` and
``gradients()`` with the same keys, ``zero_grad()``, ``train()`` and ``eval()``.
"""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from scipy.special import log_softmax


class Layer:
    """A step of a network with its parameters; `forward` saves what `backward` needs.

    Each kind of step has a `forward` and a `backward` of its own.

    Parameters
    ----------
    **parameters : ndarray
        The arrays to learn. An optimiser updates them in place.
    """

    def __init__(self, **parameters):
        self.training = True
        self._parameters = parameters
        self._gradients = {name: np.zeros_like(p) for name, p in parameters.items()}

    def __call__(self, x):
        """Return ``forward(x)``."""
        return self.forward(x)

    def forward(self, x):
        """Return y."""
        raise NotImplementedError(f"{type(self).__name__} has no forward of its own")

    def backward(self, dy):
        """Return dx, and add the gradients of the parameters to what is there."""
        raise NotImplementedError(f"{type(self).__name__} has no backward of its own")

    def parameters(self):
        """Return the live parameter arrays by name."""
        return self._parameters

    def gradients(self):
        """Return the accumulated gradients, under the names of `parameters`."""
        return self._gradients

    def zero_grad(self):
        """Set every gradient to zero."""
        for gradient in self.gradients().values():
            gradient[...] = 0

    def train(self, mode=True):
        """Switch between training and evaluation; return the layer."""
        self.training = mode
        return self

    def eval(self):
        """Switch to evaluation; return the layer."""
        return self.train(False)


class Linear(Layer):
    """Dense layer, y = x @ weight.T + bias.

    Parameters
    ----------
    in_features, out_features : int
        x is (N, in_features), y is (N, out_features).
    gain : float
        Standard deviation of y at the start, for x of mean square 1. The default is for a ReLU
        to follow (He et al., arXiv:1502.01852); a small one before a softmax makes the first
        predictions modest.
    rng : numpy.random.Generator
        Draws the initial weight; bias starts at 0.
    dtype : dtype
        Of the parameters.
    """

    def __init__(self, in_features, out_features, *, gain=2**0.5, rng, dtype=np.float32):
        weight = rng.normal(0, gain / np.sqrt(in_features), (out_features, in_features))
        super().__init__(weight=weight.astype(dtype), bias=np.zeros(out_features, dtype))

    def forward(self, x):
        """Return y, (N, out_features)."""
        self._x = x
        return x @ self._parameters["weight"].T + self._parameters["bias"]

    def backward(self, dy):
        """Return dx, (N, in_features)."""
        self._gradients["weight"] += dy.T @ self._x
        self._gradients["bias"] += dy.sum(axis=0)
        return dy @ self._parameters["weight"]


class Conv2d(Layer):
    """Convolution with a square kernel, padded so that stride 1 keeps height and width.

    Parameters
    ----------
    in_channels, out_channels : int
        x is (N, in_channels, H, W), y is (N, out_channels, ceil(H / stride), ceil(W / stride)).
    kernel_size : int
        An odd number.
    stride : int
        Every how many pixels the kernel is applied.
    bias : bool
        False where a norm layer follows, which has a bias of its own.
    rng : numpy.random.Generator
        Draws the initial weight (He et al., arXiv:1502.01852); bias starts at 0.
    dtype : dtype
        Of the parameters.
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size=3,
        *,
        stride=1,
        bias=True,
        rng,
        dtype=np.float32,
    ):
        shape = (out_channels, in_channels, kernel_size, kernel_size)
        weight = rng.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape)
        parameters = {"weight": weight.astype(dtype)}
        if bias:
            parameters["bias"] = np.zeros(out_channels, dtype)
        super().__init__(**parameters)
        self.stride = stride

    def forward(self, x):
        """Return y: each window of x as a column, times the weight as a matrix."""
        weight = self._parameters["weight"]
        out_channels, _, k, _ = weight.shape
        pad, step = k // 2, self.stride
        padded = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
        windows = sliding_window_view(padded, (k, k), axis=(2, 3))[:, :, ::step, ::step]
        n, _, height, width, _, _ = windows.shape
        self._columns = windows.transpose(0, 1, 4, 5, 2, 3).reshape(n, -1, height * width)
        self._x_shape = x.shape
        y = weight.reshape(out_channels, -1) @ self._columns
        if "bias" in self._parameters:
            y += self._parameters["bias"][:, None]
        return y.reshape(n, out_channels, height, width)

    def backward(self, dy):
        """Return dx: the gradient of each column, added up where the windows overlap."""
        weight = self._parameters["weight"]
        out_channels, in_channels, k, _ = weight.shape
        pad, step = k // 2, self.stride
        n, _, height, width = dy.shape
        dy = dy.reshape(n, out_channels, -1)
        dweight = (dy @ self._columns.transpose(0, 2, 1)).sum(axis=0)
        self._gradients["weight"] += dweight.reshape(weight.shape)
        if "bias" in self._parameters:
            self._gradients["bias"] += dy.sum(axis=(0, 2))
        dcolumns = weight.reshape(out_channels, -1).T @ dy
        dcolumns = dcolumns.reshape(n, in_channels, k, k, height, width)
        _, _, x_height, x_width = self._x_shape
        dx = np.zeros((n, in_channels, x_height + 2 * pad, x_width + 2 * pad), dcolumns.dtype)
        for i in range(k):
            for j in range(k):
                rows = slice(i, i + step * height, step)
                columns = slice(j, j + step * width, step)
                dx[:, :, rows, columns] += dcolumns[:, :, i, j]
        return dx[:, :, pad : pad + x_height, pad : pad + x_width]


class ReLU(Layer):
    """max(x, 0), element by element."""

    def forward(self, x):
        """Return y, of x's shape."""
        self._positive = x > 0
        return np.maximum(x, 0)

    def backward(self, dy):
        """Return dx, of x's shape."""
        return dy * self._positive


class Flatten(Layer):
    """(N, ...) to (N, number of features)."""

    def forward(self, x):
        """Return y, (N, features)."""
        self._x_shape = x.shape
        return x.reshape(len(x), -1)

    def backward(self, dy):
        """Return dx, of x's shape."""
        return dy.reshape(self._x_shape)


class Sequential(Layer):
    """One layer after the other; a parameter's name starts with its layer's position.

    Parameters
    ----------
    *layers : Layer or numbanorm.Norm
        In the order of the forward pass.
    """

    def __init__(self, *layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        """Return the output of the last layer."""
        for layer in self.layers:
            x = layer(x)
        return x

    def backward(self, dy):
        """Return the gradient of the first layer's input."""
        for layer in reversed(self.layers):
            dy = layer.backward(dy)
        return dy

    def parameters(self):
        """Return the live parameter arrays of all layers."""
        return _named(layer.parameters() for layer in self.layers)

    def gradients(self):
        """Return the gradients of all layers."""
        return _named(layer.gradients() for layer in self.layers)

    def zero_grad(self):
        """Set every gradient to zero."""
        for layer in self.layers:
            layer.zero_grad()

    def train(self, mode=True):
        """Switch all layers between training and evaluation; return the network."""
        for layer in self.layers:
            layer.train(mode)
        return super().train(mode)


def _named(dicts):
    """Join one dict per layer, as ``{"0.weight": ...}``."""
    return {f"{i}.{name}": array for i, d in enumerate(dicts) for name, array in d.items()}


class SGD:
    """Gradient descent with momentum: v = momentum * v + gradient, p = p - learning_rate * v.

    Parameters
    ----------
    layer : Layer or numbanorm.Norm
        What to train, usually a `Sequential`.
    learning_rate, momentum : float
        `learning_rate` may be changed between steps.
    """

    def __init__(self, layer, learning_rate, momentum=0.9):
        self.layer = layer
        self.learning_rate = learning_rate
        self.momentum = momentum
        self._velocity = {name: np.zeros_like(p) for name, p in layer.parameters().items()}

    def step(self):
        """Update every parameter in place, from the gradients of the last backward."""
        gradients = self.layer.gradients()
        for name, parameter in self.layer.parameters().items():
            velocity = self._velocity[name]
            velocity *= self.momentum
            velocity += gradients[name]
            parameter -= self.learning_rate * velocity


def cross_entropy(logits, labels):
    """Softmax cross-entropy, averaged over the samples, and its gradient.

    Parameters
    ----------
    logits : ndarray, (N, classes)
        Scores before the softmax.
    labels : ndarray of int, (N,)
        The right class of each sample.

    Returns
    -------
    loss : float
        -mean(log(softmax(logits)[n, labels[n]])).
    dlogits : ndarray, (N, classes)
        The gradient of `loss`.
    """
    log_p = log_softmax(logits, axis=1)
    chosen = np.arange(len(labels)), labels
    dlogits = np.exp(log_p)
    dlogits[chosen] -= 1
    return -float(log_p[chosen].mean()), dlogits / len(labels)


def fit(model, x, labels, *, rate, epochs, batch_size, rng, momentum=0.9, augment=None):
    """Train a network by gradient descent; after each epoch yield its mean loss.

    The learning rate falls from `rate` to 0 in a line.

    Parameters
    ----------
    model : Layer
        From x to logits, updated in place.
    x, labels : ndarray
        All samples, (N, ...), and their classes, (N,).
    rate, momentum : float
        Of `SGD`.
    epochs, batch_size : int
        What is left over for a batch smaller than the others sits out the epoch.
    rng : numpy.random.Generator
        Draws the order of the samples.
    augment : callable, optional
        Called with a batch and `rng`; what it returns is learned in its place.

    Yields
    ------
    float
        The mean loss over the epoch's batches.
    """
    batches = len(x) // batch_size
    rates = np.linspace(rate, 0, epochs * batches, endpoint=False).reshape(epochs, batches)
    optimiser = SGD(model, rate, momentum)
    for epoch in rates:
        order = rng.permutation(len(x))[: batches * batch_size].reshape(batches, batch_size)
        losses = []
        for optimiser.learning_rate, batch in zip(epoch, order, strict=True):
            model.zero_grad()
            samples = x[batch] if augment is None else augment(x[batch], rng)
            loss, dlogits = cross_entropy(model.train()(samples), labels[batch])
            model.backward(dlogits)
            optimiser.step()
            losses.append(loss)
        yield float(np.mean(losses))


def accuracy(model, x, labels):
    """Return the share of samples that the network, in evaluation, puts into the right class."""
    return np.mean(model.eval()(x).argmax(axis=1) == labels)
