// Nothing of its own: the shared library needs a source, and everything comes from the emulator's archive.
#include "cuda/table.h"
