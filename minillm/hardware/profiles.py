"""Step times that others have measured and published, as numbers. No torch.

`DISTSERVE` are the coefficients fitted by DistServe (Zhong et al. 2024; repository LLMServe/DistServe, simdistserve, Apache-2.0):
a prompt step takes a + b · tokens + c · Σ length², a decode step a + b · context + c · batch, in ms on A100 80GB, with one fit for batches
below 95 and one from there on. `SPLITWISE` are medians of the measurements of Splitwise (Patel et al. 2024; repository
mutinifni/splitwise-sim, MIT): ms on a machine of eight GPUs, by the tokens of a batch of prompts, and by the requests of a decode
batch with prompts of 512 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

LARGE_BATCH = 95  # from here on DistServe's second fit of a decode step holds


@dataclass(frozen=True)
class Fit:
    """Coefficients of a fitted engine in ms: prompts (a, b, c), and decode steps (a, b, c) of small and of large batches."""

    prompt: tuple[float, float, float]
    small: tuple[float, float, float]
    large: tuple[float, float, float]


DISTSERVE: dict[tuple[str, str, int], Fit] = {  # by engine, model, tensor parallel ranks
    ("DistServe", "OPT-13B", 1): Fit((18.10, 0.10191, 7.12e-6), (19.93, 6.27e-4, 0.0385), (7.17, 5.80e-4, 0.1583)),
    ("DistServe", "OPT-13B", 2): Fit((14.74, 0.06858, 2.45e-6), (13.29, 3.41e-4, 0.0630), (10.64, 3.12e-4, 0.0856)),
    ("DistServe", "OPT-13B", 4): Fit((12.06, 0.03808, 5.23e-7), (10.26, 1.88e-4, 0.0327), (10.48, 1.71e-4, 0.0457)),
    ("DistServe", "OPT-66B", 2): Fit((43.06, 0.27423, 2.25e-5), (48.29, 9.42e-4, 0.1276), (28.73, 4.74e-4, 0.2962)),
    ("DistServe", "OPT-66B", 4): Fit((29.44, 0.15135, 8.32e-6), (30.76, 4.52e-4, 0.0633), (27.47, 4.05e-4, 0.1248)),
    ("DistServe", "OPT-66B", 8): Fit((25.49, 0.10659, 3.39e-6), (23.16, 2.27e-4, 0.0480), (21.72, 3.76e-4, 0.0898)),
    ("vLLM", "OPT-13B", 1): Fit((22.05, 0.14051, 8.08e-6), (23.48, 5.93e-4, 0.0607), (20.21, 4.91e-4, 0.1200)),
    ("vLLM", "OPT-13B", 2): Fit((27.44, 0.09055, 8.45e-6), (24.54, 2.24e-4, 0.0872), (17.95, 4.57e-4, 0.1118)),
    ("vLLM", "OPT-13B", 4): Fit((30.54, 0.05151, 4.23e-7), (25.90, 7.75e-5, 0.0553), (23.88, 2.84e-4, 0.0628)),
    ("vLLM", "OPT-66B", 4): Fit((42.97, 0.21287, 4.60e-5), (39.58, 6.95e-4, 0.1358), (40.86, 4.26e-4, 0.1951)),
    ("vLLM", "OPT-66B", 8): Fit((38.93, 0.15737, 4.53e-6), (31.18, 2.76e-4, 0.0680), (29.09, 6.03e-4, 0.1390)),
}

# tokens of KV cache beside the weights, on so many ranks (simdistserve, max_num_tokens.csv)
CACHE_TOKENS: dict[tuple[str, int], int] = {
    ("OPT-13B", 1): 66_144, ("OPT-13B", 2): 163_008, ("OPT-13B", 4): 356_736,
    ("OPT-66B", 2): 11_600, ("OPT-66B", 4): 78_496, ("OPT-66B", 8): 212_304,
}  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """Points (x, ms), between which times are interpolated; beyond them the last two points' line goes on."""

    xs: tuple[int, ...]
    ms: tuple[float, ...]


PROMPT_SIZES = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)

SPLITWISE_PROMPT: dict[tuple[str, str], Curve] = {  # by model and GPU
    ("BLOOM-176B", "A100"): Curve(PROMPT_SIZES, (79.7, 99.2, 174.4, 287.5, 536.1, 1332.6, 3591.5, 5782.0, 11251.8)),
    ("BLOOM-176B", "H100"): Curve(PROMPT_SIZES, (48.3, 51.2, 76.1, 132.2, 252.0, 649.6, 1411.6, 2521.9, 4996.5)),
    ("Llama-2-70B", "A100"): Curve(PROMPT_SIZES, (65.3, 66.8, 93.0, 160.9, 282.7, 708.4, 1781.0, 3524.5, 7554.0)),
    ("Llama-2-70B", "H100"): Curve(PROMPT_SIZES, (58.2, 51.7, 53.9, 77.7, 134.4, 376.2, 831.5, 1551.7, 2936.3)),
}
SPLITWISE_TOKEN: dict[tuple[str, str], Curve] = {
    ("BLOOM-176B", "A100"): Curve(BATCH_SIZES, (48.8, 50.0, 51.0, 53.0, 57.3, 65.4, 96.6)),
    ("BLOOM-176B", "H100"): Curve(BATCH_SIZES, (36.1, 36.9, 38.1, 38.1, 40.6, 45.8, 63.8)),
    ("Llama-2-70B", "A100"): Curve(BATCH_SIZES, (44.9, 44.6, 45.8, 46.5, 50.4, 53.0, 71.6)),
    ("Llama-2-70B", "H100"): Curve(BATCH_SIZES, (29.8, 30.3, 31.8, 32.5, 34.2, 38.6, 50.2)),
}
# the same over prompt tokens · batch, which the released simulator reads at the number of decoding requests: almost flat there
SPLITWISE_TOKEN_RELEASED: dict[tuple[str, str], Curve] = {
    ("BLOOM-176B", "A100"): Curve(PROMPT_SIZES, (47.6, 47.8, 49.5, 49.4, 50.2, 51.5, 54.3, 65.7, 96.6)),
    ("BLOOM-176B", "H100"): Curve(PROMPT_SIZES, (35.6, 36.1, 36.2, 36.3, 36.8, 37.5, 39.2, 46.0, 64.0)),
    ("Llama-2-70B", "A100"): Curve(PROMPT_SIZES, (43.0, 43.5, 45.2, 44.7, 45.6, 46.5, 48.4, 53.2, 71.3)),
    ("Llama-2-70B", "H100"): Curve(PROMPT_SIZES, (30.0, 28.4, 30.5, 30.0, 31.5, 31.5, 32.8, 38.9, 50.0)),
}
