"""What to tell every rank when they do not train the same thing."""

from __future__ import annotations


def differences(answers: list[dict[str, str]]) -> str:
    """Where the ranks' answers, of the same questions, differ from rank 0's, and the remedy."""
    lines = ["hvd_sketch: the ranks disagree, so their gradients cannot be combined:"]
    for key in answers[0]:
        for rank, answer in enumerate(answers):
            if answer[key] != answers[0][key]:
                ours = sorted(set(answers[0][key].split()) - set(answer[key].split()))
                theirs = sorted(set(answer[key].split()) - set(answers[0][key].split()))
                lines.append(f"  {key}: rank 0 has {' '.join(ours[:5])!r}, rank {rank} has {' '.join(theirs[:5])!r}")
    lines.append("Give every rank the same model, compression settings and seed; load a saved memory on all or none;")
    lines.append("call broadcast_optimizer_state and then broadcast_parameters before the first step.")
    return "\n".join(lines)
