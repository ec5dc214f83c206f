"""What a model family is: how its HF config is read, and one table from Megatron parameters to HF tensors.

Import, export, resharding and sizing iterate over the table. No torch here. How to add a family: docs/families.md.
"""

from megatron_hapo.model.families.config_json import ModelConfig as ModelConfig
from megatron_hapo.model.families.config_json import read_model_config as read_model_config
from megatron_hapo.model.families.shape import FAMILIES as FAMILIES
from megatron_hapo.model.families.shape import MoeShape as MoeShape
from megatron_hapo.model.families.shape import RopeScaling as RopeScaling
from megatron_hapo.model.families.shape import Shape as Shape
from megatron_hapo.model.families.shape import layout_faults as layout_faults
from megatron_hapo.model.families.shape import padded_vocab_size as padded_vocab_size
from megatron_hapo.model.families.shape import read_shape as read_shape
from megatron_hapo.model.families.shape import shape_of as shape_of
from megatron_hapo.model.families.table import FusedExpert as FusedExpert
from megatron_hapo.model.families.table import Placement as Placement
from megatron_hapo.model.families.table import Run as Run
from megatron_hapo.model.families.table import Spec as Spec
from megatron_hapo.model.families.table import TableParameter as TableParameter
from megatron_hapo.model.families.table import expert_parameters as expert_parameters
from megatron_hapo.model.families.table import first_parameters as first_parameters
from megatron_hapo.model.families.table import fused_expert as fused_expert
from megatron_hapo.model.families.table import hf_tensor_shapes as hf_tensor_shapes
from megatron_hapo.model.families.table import is_expert as is_expert
from megatron_hapo.model.families.table import is_hf_expert as is_hf_expert
from megatron_hapo.model.families.table import last_parameters as last_parameters
from megatron_hapo.model.families.table import layer_parameters as layer_parameters
from megatron_hapo.model.families.table import linear_tensors as linear_tensors
from megatron_hapo.model.families.table import num_parameters as num_parameters
from megatron_hapo.model.families.table import placement as placement
from megatron_hapo.model.families.table import table_parameters as table_parameters
