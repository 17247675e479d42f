"""The losses, each in one place: float32, per example, to be averaged with masks by the caller."""

import jax
import jax.numpy as jnp

Array = jax.Array


def cross_entropy(logits: Array, labels: Array, *, label_smoothing: Array | float = 0.0) -> Array:
    """Softmax cross-entropy with integer labels.

    Args:
      logits: [..., C], any float dtype; the arithmetic is float32.
      labels: [...] integer in [0, C).
      label_smoothing: the share of the target distribution that is uniform over the classes.

    Returns:
      [...] float32, in nats.
    """
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    picked = jnp.take_along_axis(log_probs, labels[..., None].astype(jnp.int32), axis=-1)[..., 0]
    return -(1.0 - label_smoothing) * picked - label_smoothing * log_probs.mean(axis=-1)


def temperature_kl(
    student_logits: Array, teacher_logits: Array, *, temperature: Array | float = 1.0
) -> Array:
    """``T^2 KL(softmax(teacher / T) || softmax(student / T))`` (Hinton et al. 2015, section 2).

    The factor ``T^2`` keeps the size of the gradient independent of the temperature.

    Args:
      student_logits: [..., C].
      teacher_logits: [..., C].
      temperature: positive scalar.

    Returns:
      [...] float32, in nats; zero where the two agree up to a constant.
    """
    student = jax.nn.log_softmax(student_logits.astype(jnp.float32) / temperature, axis=-1)
    teacher = jax.nn.log_softmax(teacher_logits.astype(jnp.float32) / temperature, axis=-1)
    return temperature**2 * jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)


def squared_error(predictions: Array, targets: Array) -> Array:
    """Squared error averaged over all axes but the first: [B, ...] and [B, ...] to [B] float32."""
    if predictions.shape != targets.shape:
        raise ValueError(
            f"predictions have shape {predictions.shape} and targets {targets.shape}; they must "
            "agree."
        )
    error = jnp.square(predictions.astype(jnp.float32) - targets.astype(jnp.float32))
    return error.reshape(error.shape[0], -1).mean(axis=-1)
