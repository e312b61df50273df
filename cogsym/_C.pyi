"""The C++ extension: csrc/module.cpp. Tensors are addresses, shapes and strides in elements."""

DTYPES: tuple[str, ...]
ACTIVATIONS: tuple[str, ...]
OPENMP: bool

def cpu_features() -> list[str]: ...
def isas() -> list[str]: ...
def isa() -> str: ...
def set_isa(name: str) -> None: ...
def rms_norm(
    x: int,
    x_stride: int,
    residual: int,
    residual_stride: int,
    weight: int,
    y: int,
    h: int,
    rows: int,
    D: int,
    eps: float,
    offset: float,
    dtype: int,
    weight_dtype: int,
    num_threads: int,
) -> None: ...
def rms_norm_backward(
    dy: int,
    dy_stride: int,
    h: int,
    h_stride: int,
    dh: int,
    dh_stride: int,
    weight: int,
    dx: int,
    dweight: int,
    rows: int,
    D: int,
    eps: float,
    offset: float,
    dtype: int,
    weight_dtype: int,
    num_threads: int,
) -> None: ...
def rotary(
    x: int,
    x_strides: tuple[int, ...],
    cos: int,
    cos_strides: tuple[int, int],
    sin: int,
    sin_strides: tuple[int, int],
    y: int,
    B: int,
    T: int,
    H: int,
    D: int,
    half: int,
    interleaved: bool,
    inverse: bool,
    dtype: int,
    table_dtype: int,
    num_threads: int,
) -> None: ...
def gated_activation(
    gate: int,
    gate_stride: int,
    up: int,
    up_stride: int,
    z: int,
    rows: int,
    F: int,
    activation: int,
    dtype: int,
    num_threads: int,
) -> None: ...
def gated_activation_backward(
    dz: int,
    dz_stride: int,
    gate: int,
    gate_stride: int,
    up: int,
    up_stride: int,
    dgate: int,
    dup: int,
    rows: int,
    F: int,
    activation: int,
    dtype: int,
    num_threads: int,
) -> None: ...
def online_softmax(
    logits: int,
    targets: int,
    maximum: int,
    total: int,
    target_logit: int,
    rescale: int,
    logit_sum: int,
    argmax: int,
    rows: int,
    width: int,
    first: int,
    scale: float,
    soft_cap: float,
    exponentials: bool,
    dtype: int,
    num_threads: int,
) -> None: ...
def add_rescaled(total: int, product: int, rescale: int, rows: int, D: int, dtype: int, num_threads: int) -> None: ...
def logits_gradient(
    logits: int,
    targets: int,
    logsumexp: int,
    dloss: int,
    rows: int,
    width: int,
    first: int,
    scale: float,
    soft_cap: float,
    confidence: float,
    floor: float,
    dtype: int,
    num_threads: int,
) -> None: ...
