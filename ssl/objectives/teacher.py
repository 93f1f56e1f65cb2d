"""The EMA teacher: a copy of the student that follows it slowly and never sees a gradient."""

from copy import deepcopy
from typing import Any, Generic, Self, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

Student = TypeVar("Student", bound=nn.Module)


class Teacher(nn.Module, Generic[Student]):
    """Exponential moving average of a student network (mean teacher, Tarvainen & Valpola 2017).

    It starts as the student's copy. Only its parameters are averaged. Batch norms behave as in the published code
    of BYOL, MoCo v3 and DINO: in training they normalise with the teacher's own batches and so keep running
    statistics of their own, which are right for the averaged weights (averaging the student's would not be). All
    else that acts differently in training, dropout and stochastic depth above all, is off: a teacher is not noisy.
    """

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.network: Student = deepcopy(student).requires_grad_(False)
        self.train(student.training)

    def train(self, mode: bool = True) -> Self:
        """Training mode reaches the batch norms alone."""
        super().train(False)
        self.training = mode
        for module in self.network.modules():
            if isinstance(module, _BatchNorm):
                module.train(mode)
        return self

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's own output, without gradient."""
        return self.network(*args, **kwargs)

    @torch.no_grad()
    def update(self, student: nn.Module, momentum: float) -> None:
        """`teacher <- momentum * teacher + (1 - momentum) * student`, parameter by parameter."""
        torch._foreach_lerp_(list(self.network.parameters()), list(student.parameters()), 1 - momentum)
