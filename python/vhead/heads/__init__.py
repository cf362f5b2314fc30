"""The value head as a module: `ValueHead`, the table of head kinds, and several heads as one."""

from vhead.heads.kinds import HEAD_KINDS as HEAD_KINDS
from vhead.heads.kinds import HeadKind as HeadKind
from vhead.heads.kinds import head_for as head_for
from vhead.heads.kinds import is_plain_linear as is_plain_linear
from vhead.heads.stacked import StackedHeads as StackedHeads
from vhead.heads.stacked import stacked as stacked
from vhead.heads.value_head import DEFAULT_DROPOUT as DEFAULT_DROPOUT
from vhead.heads.value_head import DEFAULT_INITIALIZER_RANGE as DEFAULT_INITIALIZER_RANGE
from vhead.heads.value_head import HeadArguments as HeadArguments
from vhead.heads.value_head import InitialArguments as InitialArguments
from vhead.heads.value_head import ValueHead as ValueHead
from vhead.heads.value_head import check_head_arguments as check_head_arguments
from vhead.heads.value_head import hidden_size_of as hidden_size_of
