"""Seconds of a host's AdamW a million parameters: torch's forms, and DeepSpeed's where it builds.

python tests/adam_speed.py [MILLIONS [ROUNDS [THREADS]]]

Kinds take turns, so that what else the machine does falls on each alike. Seconds are of the
process, of all its threads together.
"""

import statistics
import sys
import time

import torch

LR = 1e-3


def deepspeed_adam(parameter):
    """DeepSpeed's C++ AdamW, which a compiler builds at the first call."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam([parameter], lr=LR, weight_decay=0.1, adamw_mode=True)


KINDS = {
    "torch, a tensor at a time": lambda p: torch.optim.AdamW([p], lr=LR, foreach=False),
    "torch, foreach": lambda p: torch.optim.AdamW([p], lr=LR, foreach=True),
    "torch, fused": lambda p: torch.optim.AdamW([p], lr=LR, fused=True),
    "deepspeed": deepspeed_adam,
}


def zero_step(optimizer, parameter, gradient, weight):
    """Update as ZeRO does: bf16 gradient to fp32, its norm, clipped, AdamW, master to bf16."""
    parameter.grad.copy_(gradient)
    parameter.grad.norm()
    parameter.grad.mul_(0.5)
    optimizer.step()
    weight.copy_(parameter.detach())


def steps(millions):
    """Return what makes one update, by kind, of those that there are here."""
    found = {}
    for kind, make in KINDS.items():
        parameter = torch.nn.Parameter(torch.randn(millions * 10**6))
        parameter.grad = torch.randn_like(parameter)
        try:
            optimizer = make(parameter)
        except Exception as error:
            print(f"{kind}: not here: {str(error).splitlines()[0]}")
            continue
        gradient, weight = parameter.grad.bfloat16(), parameter.detach().bfloat16()
        found[kind] = optimizer.step
        found[f"{kind}, ZeRO's step"] = lambda given=(optimizer, parameter, gradient, weight): (
            zero_step(*given)
        )
    return found


def measured(millions, rounds):
    """Return process seconds a million parameters of each round, by kind."""
    kinds = steps(millions)
    found = {kind: [] for kind in kinds}
    # the first round makes the moments
    for turn in range(rounds + 1):
        for kind, step in kinds.items():
            started = time.process_time()
            step()
            if turn:
                found[kind].append((time.process_time() - started) / millions)
    return found


def main():
    """Print each kind's median, least and most."""
    given = [int(word) for word in sys.argv[1:]]
    millions, rounds, threads = given + [20, 9, 1][len(given) :]
    torch.set_num_threads(threads)
    print(f"{millions}M parameters, {rounds} rounds, {threads} threads, torch {torch.__version__}")
    for kind, values in measured(millions, rounds).items():
        middle, least, most = statistics.median(values), min(values), max(values)
        print(f"{kind:38} {1e3 * middle:.2f} ms/M ({1e3 * least:.2f}-{1e3 * most:.2f})")


if __name__ == "__main__":
    main()
