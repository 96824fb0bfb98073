"""Response-based distillation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dyno.technique import Run, Technique

if TYPE_CHECKING:
    from torch import Tensor

    from dyno.measure.environment import Device
    from dyno.recipe import Recipe


@dataclass
class Response(Technique):
    """The trained model goes on as a student that matches a teacher's softened distribution, mixed with the labels.

    Paper: Hinton et al. 2015, arXiv:1503.02531. Loss: alpha T^2 KL(teacher_T || student_T) + (1 - alpha) CE, the KL
    summed over the vocabulary and averaged over tokens. `teacher` holds the overrides of the teacher's own recipe.
    """

    teacher: list[str] = field(default_factory=lambda: ["model=teacher"])
    steps: int = 60
    lr: float = 1e-3
    temperature: float = 2.0
    alpha: float = 0.7

    def unsupported(self, recipe: Recipe, device: Device) -> str | None:
        if self.temperature <= 0 or not 0 <= self.alpha <= 1 or self.steps < 0 or self.lr <= 0:
            return "distillation takes temperature > 0, 0 <= alpha <= 1, steps >= 0 and lr > 0"
        return None

    def apply(self, run: Run) -> None:
        import torch

        from dyno.errors import NonFinite, Unsupported
        from dyno.stages.batches import stream_batches

        assert run.model is not None and run.build_model is not None and run.stream is not None
        student, teacher = run.model, run.build_model(self.teacher).eval()
        if teacher.config.vocab_size != student.config.vocab_size:
            raise Unsupported(
                f"the teacher has {teacher.config.vocab_size} tokens, the student {student.config.vocab_size}"
            )
        workload, seed = run.recipe.config["workload"], run.recipe.config["seed"]
        student.train()
        optimizer = torch.optim.AdamW(student.parameters(), lr=self.lr, betas=(0.9, 0.95))
        stream = stream_batches(run.stream, None, workload["batch"], workload["seq"], seed + 1)
        loss = torch.zeros(())
        for _ in range(self.steps):
            tokens, targets = (t.to(run.device) for t in next(stream)[:2])
            with torch.no_grad():
                expected = teacher(tokens)
            loss = response_loss(student(tokens), expected, targets, self.temperature, self.alpha)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if not bool(torch.isfinite(loss)):
            raise NonFinite("the distillation loss is not finite; lower distillation.lr")
        run.note("distillation_loss", float(loss.detach()))
        run.note("teacher_parameters", sum(p.numel() for p in teacher.parameters()))


def response_loss(logits: Tensor, expected: Tensor, targets: Tensor, temperature: float, alpha: float) -> Tensor:
    """Logits and expected (B, S, V), targets (B, S) -> scalar."""
    import torch.nn.functional as F

    vocab = logits.shape[-1]
    student = F.log_softmax(logits.float() / temperature, -1).view(-1, vocab)
    teacher = F.log_softmax(expected.float() / temperature, -1).view(-1, vocab)
    divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    labels = F.cross_entropy(logits.float().view(-1, vocab), targets.reshape(-1))
    return alpha * temperature**2 * divergence + (1 - alpha) * labels
