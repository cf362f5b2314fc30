"""The update: rollouts through a model once, with gradients, and the losses that are taken of what comes out."""

from vhead.training import losses as losses
from vhead.training.batches import TrainingBatch as TrainingBatch
from vhead.training.freezing import freeze as freeze
from vhead.training.gradient_check import TrainingPlan as TrainingPlan
from vhead.training.outputs import TrainingOutput as TrainingOutput
from vhead.training.totals import Totals as Totals
from vhead.training.training_pass import TrainingPass as TrainingPass
