"""SGD whose convolutions take orthogonal steps: Muon (Jordan et al., 2024,
kellerjordan.github.io/posts/muon).

The Nesterov momentum of a convolution's weight W, as a matrix of n rows, one per output channel, is
replaced by the orthogonal matrix O that is nearest to it, so that every direction in which the
layer can learn gets the same step:

    W <- W - lr ||W|| O / ||O||,  then back to the length that W had

since a batch norm behind it takes no notice of that length (as in airbench, arXiv 2404.00498). lr
is thus the angle, in radians, by which the weights of a layer turn in a step. O comes from five
Newton-Schulz iterations, on the n x n Gram matrix alone, which costs half as much.
"""
import torch
from torch import nn
from torch.linalg import vector_norm

COEFFICIENTS = 3.4445, -4.7750, 2.0315      # Jordan's: singular values end between 0.7 and 1.2
ITERATIONS = 5
RATE = 0.5          # of the rate of all other parameters
TINY = 1e-12
LEAST = 0.1         # length of W per square root of n: one that begins as 0 has to grow


def convolutions_of(classifier):
    """The weights that take orthogonal steps, in a network with batch norms: of its convolutions
    but grouped ones and those of one pixel with a bias, whose length matters, as in gates and
    heads. A weight that is computed, as weight_norm's, is not learned."""
    modules = list(classifier.network.modules())
    if not any(isinstance(each, nn.modules.batchnorm._BatchNorm) for each in modules):
        return []
    found = [each.weight for each in modules if isinstance(each, nn.Conv2d) and each.groups == 1
             and (each.bias is None or each.kernel_size != (1, 1))]
    return list({id(each): each for each in found if isinstance(each, nn.Parameter)}.values())


def orthogonal(matrices):
    """For each (n, m) float32 matrix one nearly orthogonal one: U V' of its U S V', with singular
    values near 1. All that have one smaller side are computed together.

    Columns of zeros stay what they are. On a CPU they are left out, which takes 0.6 of the time
    at 32x32 pixels, where the last blocks of a ResNet-18 see 1x1: of a kernel's nine taps eight
    get no gradient. A card would have to wait to know them."""
    if any(each.device.type != "cpu" for each in matrices):
        return _orthogonal(matrices)
    live = [each.any(0).nonzero()[:, 0] for each in matrices]
    found = _orthogonal([each.index_select(1, columns) if len(columns) < each.shape[1] else each
                         for each, columns in zip(matrices, live, strict=True)])
    return [each if each.shape == like.shape else
            torch.zeros_like(like).index_copy_(1, columns, each)
            for each, like, columns in zip(found, matrices, live, strict=True)]


def _orthogonal(matrices):
    wide = [each if each.shape[0] <= each.shape[1] else each.T for each in matrices]
    wide = [each / vector_norm(each).clamp_min(TINY) for each in wide]
    found = [None] * len(wide)
    for n in sorted({len(each) for each in wide}):
        here = [at for at, each in enumerate(wide) if len(each) == n]
        gram = torch.stack([wide[at] @ wide[at].T for at in here])
        whole = step = _polynomial(gram)
        for _ in range(ITERATIONS - 1):
            gram = step @ gram @ step       # of step X
            step = _polynomial(gram)
            whole = step @ whole
        for at, each in zip(here, whole, strict=True):
            found[at] = each @ wide[at]
    return [each if each.shape == like.shape else each.T
            for each, like in zip(found, matrices, strict=True)]


def _polynomial(gram):
    """What X, of which these are the Gram matrices (K, n, n), is multiplied with next."""
    a, b, c = COEFFICIENTS
    return torch.baddbmm(b * gram, gram, gram, alpha=c) + a * torch.eye(
        gram.shape[1], device=gram.device)


class Muon(torch.optim.SGD):
    """As torch.optim.SGD, with orthogonal steps for `convolutions`, at RATE times its rate and
    without weight decay."""

    def __init__(self, parameters, convolutions, lr, **options):
        taken = {id(each) for each in convolutions}
        groups = [{"params": [each for each in parameters if id(each) not in taken]},
                  {"params": list(convolutions), "lr": lr * RATE}]
        super().__init__(groups, lr, **options)

    @torch.no_grad()
    def step(self):
        group = self.param_groups[1]
        weights = [each for each in group["params"] if each.grad is not None]
        if weights:
            self._turn(weights, group["lr"], group["momentum"])
        super().step()

    def _turn(self, weights, lr, momentum):
        gradients = [each.grad for each in weights]
        for each in weights:
            each.grad = None        # nothing is left for SGD
            if "momentum_buffer" not in self.state[each]:
                self.state[each]["momentum_buffer"] = torch.zeros_like(each)
        buffers = [self.state[each]["momentum_buffer"] for each in weights]
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, gradients)
        torch._foreach_add_(gradients, buffers, alpha=momentum)
        allowed = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False       # rounded so, small directions explode
        steps = orthogonal([each.flatten(1) for each in gradients])
        torch.backends.cuda.matmul.allow_tf32 = allowed
        for weight, step in zip(weights, steps, strict=True):
            length = vector_norm(weight).clamp_min(LEAST * len(weight) ** 0.5)
            angle = lr * length / vector_norm(step).clamp_min(TINY)
            weight.sub_(step.reshape(weight.shape) * angle)
            weight.mul_(length / vector_norm(weight).clamp_min(TINY))
