"""What brings experts' outputs together over widths, where all weights begin at .02.

    python -m tests.training.measure_width

Prints, for seeds 0 to 2, largest over smallest of what five steps change of the experts' outputs at widths 64 to 512
(see test_width): as it is, with an embedding of .1, with a fifth of the embedding's rate, and with the epsilons of Adam
and of the norms near 0.
"""

from tests.training.test_width import SEEDS, WIDTHS, five_steps


def slow_embedding(decoder, optimizer) -> None:
    """A fifth of its rate."""
    embedding = decoder.embed_tokens.weight
    for group in list(optimizer.param_groups):
        others = [parameter for parameter in group["params"] if parameter is not embedding]
        if len(others) < len(group["params"]):
            group["params"] = others
            optimizer.add_param_group({"params": [embedding], "lr": group["lr"] / 5, "weight_decay": 0.0})


def no_epsilon(decoder, optimizer) -> None:
    """Of Adam."""
    for group in optimizer.param_groups:
        group["eps"] = 1e-20


VARIANTS = {
    "as it is": {"embedding": 0.02},
    "embedding .1": {"embedding": 0.1},
    "embedding's rate a fifth": {"embedding": 0.02, "adjust": slow_embedding},
    "no epsilon": {"embedding": 0.02, "adjust": no_epsilon, "rms_norm_eps": 1e-12},
}

if __name__ == "__main__":
    for name, changes in VARIANTS.items():
        spread = []
        for seed in SEEDS:
            found = [five_steps(n, seed, base_hidden_size=64, initializer_range=0.02, **changes) for n in WIDTHS]
            experts = [one["experts"] for one in found]
            spread.append(f"{max(experts) / min(experts):.2f}")
        print(f"{name}: {', '.join(spread)}")
