"""The published Manifold Muon step, written naively from the paper's text: one matrix at a time,
one line per formula, no batching and nothing shared with the product.

Sources: arXiv 2606.13276, Appendix A (loop, projectors, retractions); arXiv 2505.16932, Algorithm 1.
"""

from __future__ import annotations

import torch

POLAR_EXPRESS = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
]


def polar_express(X, steps=10):
    X = X / (X.norm() * 1.01)
    for k in range(steps):
        a, b, c = POLAR_EXPRESS[min(k, 7)]
        if k < 7:
            a, b, c = a / 1.01, b / 1.01**3, c / 1.01**5
        X = a * X + b * X @ X.T @ X + c * X @ X.T @ X @ X.T @ X
    return X


def projector(M, manifold):
    if manifold == "stiefel":
        return M
    if manifold == "dgram":
        return M - torch.diag(torch.diag(M))
    assert manifold == "oblique"
    return torch.diag(torch.diag(M))


def dual_ascent(W, G, manifold, K=20, alpha=0.1):
    """Direction A of the published loop."""
    if W.shape[0] < W.shape[1]:
        return dual_ascent(W.T, G.T, manifold, K, alpha).T
    L = -0.25 * projector(W.T @ G + G.T @ W, manifold)
    for k in range(K):
        A = polar_express(G + 2 * W @ projector((L + L.T) / 2, manifold))
        H = projector(W.T @ A + A.T @ W, manifold)
        L = L - alpha * (1 - k / K) * H
    return A


def retract(V, manifold):
    """The paper's retractions, by SVD."""
    if V.shape[0] < V.shape[1]:
        return retract(V.T, manifold).T
    if manifold == "oblique":
        return torch.stack([column / column.norm() for column in V.T], dim=1)
    U, S, Qt = torch.linalg.svd(V, full_matrices=False)
    if manifold == "stiefel":
        return U @ Qt
    assert manifold == "dgram"
    return U @ Qt @ torch.diag(S)


def step(W, grad, buf, manifold, lr, momentum=0.95):
    """One optimizer step; returns the new W and momentum buffer."""
    buf = momentum * buf + grad
    G = grad + momentum * buf
    return retract(W - lr * dual_ascent(W, G, manifold), manifold), buf
