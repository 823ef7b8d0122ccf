"""Compare the kernels of the cross-entropy with torch in Triton's interpreter; prints the largest error. Run by
test_kernels.py."""

import torch
from cases import largest, relative_error

from inplace_ttt.megatron import loss
from inplace_ttt.megatron.kernels import loss as kernels


def main():
    torch.manual_seed(0)
    errors = []
    for rows, columns, here in [(3, 5, 5), (4, 4096, 4000), (2, 9000, 9000), (3, 64, 0)]:
        logits = torch.randn(rows, columns) * 20
        logits[0, :3] = -torch.inf
        label = torch.randint(-1, max(here, 1), (rows,)) if here else torch.full((rows,), -1)
        counts = torch.arange(rows) != 1
        found, expected = kernels.best_and_sums(logits, here), loss.best_and_sums(logits, here)
        assert found[0].equal(expected[0])
        errors.append(relative_error(found[1], expected[1]) if here else (found[1] - expected[1]).abs().max().item())
        log_sum = torch.logsumexp(logits, dim=1)
        arguments = log_sum, label, counts, here, torch.float32
        found, expected = (part.logit_gradients(logits.clone(), *arguments) for part in (kernels, loss))
        errors.append((found - expected).abs().max().item())
        assert not found[1].any() and not found[:, here:].any()
    for bad in (torch.nan, torch.inf):
        logits = torch.randn(2, 5000)
        logits[1, 4500] = bad
        best, sums = kernels.best_and_sums(logits, 5000)
        losses = sums.log() + best
        assert losses[0].isfinite() and not losses[1].isfinite(), losses
    print(largest(errors))


if __name__ == "__main__":
    main()
