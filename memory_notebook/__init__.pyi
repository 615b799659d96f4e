# The names that people import: `from memory_notebook import NTM, MemoryBank`. Each is loaded when it is asked for.
from .agent.agent import ContinualAgent, make_task, plot_results, run_demo
from .agent.controller import MemoryController
from .agent.episodic import EpisodicMemory, EpisodicMemoryConfig
from .agent.meta import MetaLearner
from .agent.oneshot import MANN, RareEventMemory
from .agent.replay import ReplayBuffer
from .continual.consolidation import EWC, MAS, SI, LwF
from .continual.continual import ContinualLearningModel, ContinualLearningTrainer
from .continual.families import AGEM, DER, ER, GEM, SLDA, ICaRL
from .core import detach, set_seed
from .data import load_digits, load_mnist
from .language.bank import MemoryBank
from .language.gpt2 import ContinualLearningGPT2, ContinualLearningLlama, with_memory
from .language.reads import SimpleMemoryAttention
from .learner import Learner
from .machines.dnc import DNC, DifferentiableNeuralComputer, DNCCell, DNCConfig
from .machines.ntm import NTM, NeuralTuringMachine, NTMCell, NTMConfig
from .reasoning.hops import CompositionMemory
from .reasoning.knowledge import KnowledgeGraphModel
from .reasoning.reasoning import EntailmentNetwork, ReasoningNetwork
from .reasoning.temporal import TemporalMemoryModel
from .runs import load_result, run_experiment
from .sparse.engram import Engram, EngramConfig, add_engram
from .sparse.finetuning import SparseFinetuner, add_memory_layers
from .sparse.sparse import ProductKeyConfig, ProductKeyMemory
from .speeds.delta import DeltaMemory, MemoryRule, linear_memory
from .streams import rotated_stream, split_stream
from .train import MemoryTrainer, fit, load_checkpoint, save_checkpoint
