"""What a site says when its server cannot be reached: one line for a cause, and one when the server answers again.

In: what Flower's SuperNode wrote into its log; out: lines for the user. The log only says that something failed, so the
cause is looked for by a TLS handshake of our own, with the certificate and the name that the SuperNode is held to.
"""

import socket
import ssl
from pathlib import Path

_SECONDS = 3.0
_HOSTNAME_MISMATCH, _ADDRESS_MISMATCH, _NOT_YET_VALID, _EXPIRED = 62, 64, 9, 10  # OpenSSL's X509_V_ERR_*
_FAILED = ("Connection attempt failed", "SSL/TLS handshake error", "Exit Code: ")
_REACHED = ("Connection successful", "SuperNode ID:")
_MAX_READ = 1 << 20  # bytes of log a look; a log that grows faster is read later


def why_unreachable(server: str, certificate: Path) -> str | None:
    """None if HOST:PORT answers with a certificate that `certificate` signed, else what is wrong and what to do."""
    host, _, port = server.rpartition(":")
    host = host.strip("[]")
    try:
        context = ssl.create_default_context(cafile=str(certificate))
    except (OSError, ssl.SSLError) as error:
        return f"{certificate}: no certificate ({error}); copy the folder again that `chainfed keys` made for this site"
    try:
        with (
            socket.create_connection((host, int(port)), _SECONDS) as connection,
            context.wrap_socket(connection, server_hostname=host),
        ):
            return None
    except ssl.SSLCertVerificationError as error:
        return _certificate_trouble(error, host, certificate)
    except ssl.SSLError as error:
        return f"expected TLS, got something else ({error.reason}); --server has to name the port of `chainfed serve`"
    except socket.gaierror as error:
        return f"the name {host} is not known here ({error.strerror}); check --server and this machine's network"
    except ConnectionRefusedError:
        return "nobody listens there; is `chainfed serve` running, and does its --listen name this address and port?"
    except TimeoutError:
        return f"no answer within {_SECONDS:g} seconds; check the address, the network and the firewalls between"
    except OSError as error:
        return f"the connection broke off ({error.strerror or error}); check the address and the network"


class ServerWatch:
    """Follows a SuperNode's log. `trouble`: what was said last, None while the server answers. `run_ended`: set by the
    caller once the server's run is over, after which it is expected to go."""

    def __init__(self, site: str, server: str, certificate: Path, log: Path) -> None:
        self._site, self._server, self._certificate, self._log = site, server, certificate, log
        self._read = log.stat().st_size if log.exists() else 0
        self.trouble: str | None = None
        self.run_ended = False
        self._reached_before = False

    def look(self) -> str | None:
        """What the log's new lines mean, the last sign in them; None where there is nothing new to say."""
        text = self._new_text()
        failed, reached = (max(text.rfind(sign) for sign in signs) for signs in (_FAILED, _REACHED))
        if failed < 0 and reached < 0:
            return None
        if reached > failed:
            line = f"{self._server} answers" if not self._reached_before or self.trouble else None
            self.trouble, self._reached_before = None, True
            return line and f"{self._site}: {line}"
        reason = why_unreachable(self._server, self._certificate) or self._refused(text)
        if reason is None or reason == self.trouble:
            return None
        self.trouble = reason
        if self.run_ended:
            return None
        expected = "expected the server" + (" to be there still" if self._reached_before else "")
        return f"{self._site}: {self._server}: {expected}: {reason}; trying again until Ctrl-C"

    def _refused(self, text: str) -> str | None:
        """The server is well and its certificate too: a SuperNode that ended all the same was not let in."""
        if "Exit Code: 305" not in text and "UNAUTHORIZED" not in text.upper():
            return None  # a short break that is over
        return (
            "it does not let this site in: its key is not registered, or not yet (`chainfed serve --sites` has to name "
            f"{self._site}, and keys/server/sites/{self._site}.pub belong to this site.key), or an earlier process of "
            "this site still counts as running, which ends within a minute"
        )

    def _new_text(self) -> str:
        try:
            if self._log.stat().st_size <= self._read:
                return ""
            with open(self._log, "rb") as file:
                file.seek(self._read)
                content = file.read(_MAX_READ)
        except FileNotFoundError:
            return ""
        whole = content[: content.rfind(b"\n") + 1]
        self._read += len(whole)
        return whole.decode("utf-8", errors="replace")


def _certificate_trouble(error: ssl.SSLCertVerificationError, host: str, certificate: Path) -> str:
    if error.verify_code in (_HOSTNAME_MISMATCH, _ADDRESS_MISMATCH):
        return (
            f"its certificate is for other names than {host}; make the server's with `chainfed keys --host {host}`, or "
            "use a name it has"
        )
    if error.verify_code in (_NOT_YET_VALID, _EXPIRED):
        return f"its certificate does not hold now ({error.verify_message}); check both clocks, or make new keys"
    return (
        f"its certificate is not signed by {certificate} ({error.verify_message}); use the folder sites/NAME that "
        "`chainfed keys` made together with the server's"
    )
