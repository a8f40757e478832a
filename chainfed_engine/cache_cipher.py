"""Encryption of a boundary cache at rest: AES-256-GCM under a key that lives in this process alone.

In: a piece of plain bytes and what it is bound to; out: as many bytes, a number and a tag for the index, and back. The
key is never written, so whatever a process leaves on the disk is unreadable once it has ended, however it ended; a
cache of an earlier process is a miss and computed anew, with the same bits. Needs the package `cryptography`.
"""

from chainfed_engine.errors import NativeUnavailable

_NONCE_BYTES, TAG_BYTES = 12, 16


class CacheCipher:
    """One key, made at random, and a counter that no two pieces share. Not thread-safe."""

    def __init__(self) -> None:
        try:
            from cryptography.exceptions import InvalidTag
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ImportError as error:
            raise NativeUnavailable(
                "[memory] encrypt_cache: the package cryptography is missing; pip install 'chainfed-engine[privacy]'"
            ) from error
        self._invalid: type[Exception] = InvalidTag
        self._cipher = AESGCM(AESGCM.generate_key(256))
        self._next = 0

    def encrypt(self, plain: bytes | memoryview, bound_to: str) -> tuple[bytes, int, int]:
        """Ciphertext of the same length, number, tag."""
        number, self._next = self._next, self._next + 1
        sealed = self._cipher.encrypt(_nonce(number), plain, bound_to.encode())
        return sealed[:-TAG_BYTES], number, int.from_bytes(sealed[-TAG_BYTES:], "big")

    def decrypt(self, sealed: bytes | memoryview, number: int, tag: int, bound_to: str) -> bytes | None:
        """The plain bytes; None where anything was changed, or the key was another process's."""
        if not 0 <= number < 1 << 8 * _NONCE_BYTES or not 0 <= tag < 1 << 8 * TAG_BYTES:
            return None
        whole = bytes(sealed) + tag.to_bytes(TAG_BYTES, "big")
        try:
            plain: bytes = self._cipher.decrypt(_nonce(number), whole, bound_to.encode())
        except self._invalid:
            return None
        return plain


def _nonce(number: int) -> bytes:
    return number.to_bytes(_NONCE_BYTES, "big")
