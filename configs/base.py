"""Every knob once, with its unit and consequence. Other recipes state only differences.

Source:   GPT-2 (Radford et al. 2019) block, cut down to a size that two CPU cores train.
Command:  python launch.py config --config=configs/base.py
"""

from typing import TypeVar

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

T = TypeVar("T")


def pick(sizes: dict[str, T], name: str) -> T:
    """The row of a recipe's table of sizes that `--config=FILE:NAME` asks for."""
    if name not in sizes:
        raise ValueError(f"no size {name!r}; sizes: {', '.join(sizes)}")
    return sizes[name]


def get_config() -> ConfigDict:
    c = ConfigDict()

    # One integer decides initial values, data order, dropout and sampling.
    c.seed = 0

    c.model = m = ConfigDict()
    # Rows of the token table. 50,304 is GPT-2's 50,257 rounded up to a multiple of 128, so
    # that it divides over devices; generation never emits an id beyond the tokenizer's.
    m.vocab_size = 50304
    m.context = 256  # tokens a position can look back over, itself included
    m.layers = 4
    m.width = 128  # D, of the residual stream
    m.heads = 4  # N, query heads
    m.kv_heads = placeholder(int)  # K; None: as many as heads (MHA), 1: MQA, between: GQA
    m.head_dim = placeholder(int)  # H; None: width / heads
    m.feedforward = "gelu"  # relu | gelu | relu2 | swiglu | geglu | gelu_experts | swiglu_experts
    # F, of each expert too; None: 4 D, gated 8/3 D rounded up to a multiple of 64
    m.ff_dim = placeholder(int)
    # Of a mixture of experts; without one these mean nothing.
    m.experts = 8  # E
    m.experts_per_token = 2  # those with the highest scores of the router
    m.shared_experts = 0  # so many more that each token passes through
    m.normalise_gates = (
        True  # weights of a token's experts add up to 1 (Mixtral); else softmax over E
    )
    # A row's tokens beyond this times an even share of an expert are passed over, the last first;
    # None: none. Not while text is generated.
    m.capacity_factor = placeholder(float)
    m.balance_loss = 0.01  # weight of the loss that balances experts, 1 where they are even
    m.router_z_loss = 0.0  # weight of mean log(Z)^2 of the router; ST-MoE has 1e-3
    # How far a step moves the bias by which an expert with less or more than an even share is chosen
    # more or less often (DeepSeek-V3: 1e-3, with balance_loss near 0); None: no bias.
    m.balance_rate = placeholder(float)
    m.position = "learned"  # learned | sinusoidal | rope | alibi | none
    m.rope_base = 10000.0  # longest RoPE wavelength is 2 pi times this, in tokens
    m.rope_scaling = "none"  # none | linear | dynamic | llama3 | yarn: how RoPE was stretched
    m.rope_factor = 1.0  # context after stretching / before
    m.rope_original_context = placeholder(int)  # tokens before; linear does not need it
    m.rope_rotations = (1.0, 32.0)  # llama3, yarn: fewer turns are stretched, more are left alone
    m.norm = "layernorm"  # layernorm | rmsnorm | parameterfree
    m.norm_placement = "pre"  # pre | post | sandwich
    m.norm_eps = 1e-5  # added to the variance
    m.bias = True  # biases in every projection and in LayerNorm
    m.attention_bias = "same"  # same (as bias) | all | qkv | none: of the attention's projections
    m.parallel_block = False  # attention and feed-forward read the same normalised input
    m.qk_norm = False  # RMS-normalise queries and keys per head, before positions
    m.windows = (None,)  # tokens each layer sees, itself included; pattern repeats; None: all
    m.attention_softcap = placeholder(float)  # s: scores become s tanh(scores / s)
    m.logit_softcap = placeholder(float)  # likewise for the final logits
    m.value_residual = False  # each layer mixes its values with the first layer's
    m.tied = True  # the output projection is the token table
    m.dropout = 0.0  # on embeddings and on each residual branch's output
    m.init = "gpt2"  # gpt2 | fan_in | zero_out
    m.init_scale = 1.0  # factor on the standard deviation of every initial value that is drawn
    # What is tuned at a base shape serves at any width, under mup_depth at any depth too: scale
    # and rate of the matrices, scores and logits change with width / base, so that peak_lr and
    # init are those of the base. F and heads x H must grow with the width; not for Muon, Adafactor.
    m.parametrisation = "standard"  # standard | mup | mup_depth
    m.mup_base_width = placeholder(int)  # D of the shape that was tuned; mup needs it
    m.mup_base_heads = placeholder(int)  # N of that shape; None: as many as heads, so that H grows
    m.mup_base_layers = placeholder(int)  # L of that shape; mup_depth needs it
    m.attention = "auto"  # auto: by devices and length | plain | flash | block | cudnn | splash
    m.scan_layers = False  # one compiled block for all layers: compiles faster, runs slower on CPU
    m.remat = "none"  # none | dots | attention | full: memory for recomputation
    m.dtype = "float32"  # of activations, or bfloat16; parameters, softmax and loss stay float32
    # How what is multiplied is rounded. fp8: projections and feed-forward, for training on GPUs that
    # have it; a tensor has one scale, which rows of a batch then share. int8: those, token table and
    # logits, for models that are trained; weights then take a byte each while text is generated.
    m.products = "dtype"  # dtype | fp8 | int8

    c.optim = o = ConfigDict()
    o.optimizer = "adamw"  # adamw | lion | adafactor | muon | schedule_free
    o.peak_lr = 1e-3
    o.schedule = "cosine"  # constant | cosine | linear | wsd
    o.warmup_steps = 50  # linear from 0
    o.decay_fraction = 0.2  # wsd: the last share of the run, in which the rate decays
    o.final_lr_fraction = 0.1  # of peak_lr, at the last step
    o.schedule_steps = placeholder(int)  # where the schedule ends, and the rate stays; None: steps
    o.b1 = 0.9
    o.b2 = 0.95
    o.eps = 1e-8
    o.momentum = 0.95  # muon only
    o.weight_decay = 0.1  # decoupled; multiplied by the learning rate
    o.decay_mask = "matrices"  # matrices | no_embedding | all: which parameters decay
    o.clip = 1.0  # global gradient norm; None: no clipping
    o.ema_decay = placeholder(float)  # weight average evaluated in place of the weights; None: off
    o.z_loss = 0.0  # weight of mean log(Z)^2, which keeps logits from drifting
    o.loss_vocab_chunk = placeholder(int)  # logits live at most this many columns at a time

    c.data = d = ConfigDict()
    d.sources = ("shakespeare",)  # token stores (folders), nanoGPT folders, or built-in texts
    d.weights = placeholder(tuple)  # sampling shares of the sources; None: by their tokens
    d.tokenizer = "gpt2"  # bytes, any tiktoken encoding, or a folder with a tokenizer.json
    # masked: attention stays in its document; document: one a row; whole: as many documents a row as
    # fit, none cut, as dialogues; pairs: two a row, the chosen and the rejected text; prompts: one a
    # row, which the model answers.
    d.packing = "stream"  # stream | masked | document | whole | pairs | prompts
    d.batch_size = 8  # rows of an optimiser step, over all devices and accumulation
    d.group = 1  # grpo: rows that answer the same prompt, one after another

    c.mesh = ConfigDict()
    c.mesh.data = placeholder(int)  # batch-parallel replicas; None: all remaining devices
    c.mesh.fsdp = 1  # shards parameters and optimiser state as well as the batch
    c.mesh.expert = 1  # shards experts as well as the batch
    # Shards the tokens of a row: a longer context, for which memory falls as 1 / n. It takes contexts
    # that are multiples of 2 n.
    c.mesh.sequence = 1
    c.mesh.tensor = 1  # shards heads, feed-forward and vocabulary

    c.train = t = ConfigDict()
    t.steps = 500
    # next_token counts by the weights of the store, as of dialogues; dpo, ipo and simpo compare pairs;
    # grpo draws answers to prompts and learns by their reward.
    t.objective = "next_token"  # next_token | dpo | ipo | simpo | grpo
    # How much a difference between the chosen and the rejected text counts. Of dpo and ipo: the more,
    # the nearer the model stays to what it was when training began. simpo has about 2. Of grpo: the
    # weight of the divergence from the base of adapters; else 0.
    t.beta = 0.1
    t.gamma = 0.5  # simpo: by how much the chosen reward is to be higher; half of beta or less
    # grpo: FILE.py:FUNCTION of (row of the data, answer), which says what an answer is worth, a number
    # that is the same each time. Its file's content is a part of the run.
    t.reward = placeholder(str)
    t.answer_tokens = 128  # grpo: of an answer, at most; it is drawn at temperature 1
    # What is not trained stays as it begins. unfrozen: all but train.frozen; lora: adapters of the
    # blocks' matrices; qlora: the same, with these matrices in 8 bits; last_n_layers: train.last_layers
    # blocks and nothing else; heads_only: the output projection.
    t.trainable = "all"  # all | unfrozen | lora | qlora | last_n_layers | heads_only
    t.frozen = ()  # patterns of paths that stay as they begin: ("embed/*", "blocks/attention/*")
    t.last_layers = 1  # how many last_n_layers trains
    # LoRA adds lora_alpha / lora_rank * A B to a matrix; A is D x lora_rank, B begins at 0.
    t.lora_rank = 8
    t.lora_alpha = 16.0
    t.lora_matrices = ()  # patterns: ("attention/query", "feedforward/*"); (): all of the blocks
    t.lora_dropout = 0.0  # on what A reads
    # Micro-batches a step: memory falls, and the result changes by rounding alone, but with dropout,
    # which each micro-batch draws anew.
    t.accumulation = 1
    t.log_every = 10
    t.watch = ()  # stream_rms | score_max | dead_units | update_rms: see gptjax/watch.py
    t.watch_every = 100  # at the cost of about a forward pass each
    t.eval_every = 250
    t.checkpoint_every = 250
    t.keep_checkpoints = 2  # the latest so many
    t.branch = placeholder(str)  # begin with the state of another run, RUN@STEP; None: at random
    # A loss so many standard deviations above those of the last 100 steps sends the run back to its
    # last checkpoint, and past the batches that it read since; None: never.
    t.spike = placeholder(float)
    t.keep_every = placeholder(int)  # and those of every so many steps for ever; None: no others
    # Several processes end, to be started again, if one has not moved for so long in a step, or for
    # six times as long while it compiles, evaluates or saves.
    t.hang_seconds = 600.0

    c.eval = e = ConfigDict()
    e.context = placeholder(int)  # tokens a window; None: model.context
    e.stride = placeholder(int)  # tokens scored a window; None: eval.context, no overlap
    e.prefix = "eot"  # eot (end-of-text before the first token) | bos | none: it goes unscored
    e.documents = placeholder(str)  # joined | apart (see nothing of others); None: as data.packing
    e.batch_size = 16  # windows at once
    e.max_tokens = placeholder(int)  # score only so many tokens; None: all

    c.sample = s = ConfigDict()
    s.prompt = "KING.\n"
    s.batch_size = 1  # texts from the same prompt
    s.max_new_tokens = 100
    s.temperature = 0.8  # 0: greedy
    s.top_k = placeholder(int)  # None: off
    s.top_p = 0.95  # None: off
    s.repetition_penalty = 1.0  # above 1 discourages tokens already in the text
    s.stop = placeholder(str)  # a text of one token to stop at, besides end-of-text
    return c
