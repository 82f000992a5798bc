"""The router input `context`: what the running mean is, and that it can go on."""

import torch

from nexus_ds.model.context import context, running_mean


def test_the_input_is_the_normalised_mean_of_the_text_so_far_less_a_vector():
    x_BSH = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1))
    mean_H = torch.tensor([1.0, 2.0, 3.0, 4.0])
    found = context(x_BSH.flatten(0, 1), 5, mean_H).view(2, 5, 4)
    running = x_BSH[1, :4].mean(0)
    torch.testing.assert_close(
        found[1, 3], running / (running.square().mean() + 1e-6).sqrt() - mean_H
    )


def test_running_means_go_on_where_they_stopped_and_skip_padding():
    x_BSH = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(1))
    whole, _ = running_mean(x_BSH)
    first, state = running_mean(x_BSH[:, :5])
    second, _ = running_mean(x_BSH[:, 5:], before=state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    valid = torch.tensor([[0, 0, 0] + [1] * 6, [1] * 9])
    padded, _ = running_mean(x_BSH, valid)
    torch.testing.assert_close(padded[0, 3:], running_mean(x_BSH[:1, 3:])[0][0])
    torch.testing.assert_close(padded[1], whole[1])
