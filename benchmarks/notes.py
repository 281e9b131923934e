"""What handlers note of a change, in a file that the benchmark reads."""

import struct

#: When its task started and ended, commit LSN, index and key.
NOTE = struct.Struct("!ddQIQ")
