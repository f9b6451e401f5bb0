"""The longest sequence for which a certificate holds."""

from transformers import GPT2Config, LlamaConfig, MambaConfig, Phi3Config

from pml.positions import max_positions


def test_max_positions_is_the_limit_in_the_configuration_or_none() -> None:
    assert max_positions(LlamaConfig(max_position_embeddings=640)) == 640
    assert max_positions(GPT2Config(n_positions=160)) == 160
    assert max_positions(MambaConfig()) is None


def test_max_positions_of_longrope_is_the_length_at_which_the_rotary_factors_change() -> None:
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
    config = Phi3Config(
        hidden_size=128,
        num_attention_heads=4,
        max_position_embeddings=640,
        original_max_position_embeddings=64,
        rope_parameters={**rope, "rope_theta": 10000.0},
    )
    assert max_positions(config) == 64
