"""The format of the notes that handlers write of changes, to a file that the benchmark reads."""

import struct

#: Start and end of the task (seconds since 1970), commit LSN, index and key of the change.
NOTE = struct.Struct("!ddQIQ")
