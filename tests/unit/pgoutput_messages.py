"""One message of pgoutput of each kind, as bytes."""

LSN, AT = (0x16B3748).to_bytes(8, "big"), (5).to_bytes(8, "big")
XID, OID = (730).to_bytes(4, "big"), (16385).to_bytes(4, "big")
INSERT = b"I" + OID + b"N\0\x02t\0\0\0\x011n"

MESSAGES = {
    "begin": b"B" + LSN + AT + XID,
    "commit": b"C\0" + LSN + LSN + AT,
    "origin": b"O" + LSN + b"node\0",
    "relation": b"R" + OID + b"public\0orders\0d\0\x01\x01id\0" + b"\0\0\0\x14" + b"\xff" * 4,
    "type": b"Y" + OID + b"public\0mood\0",
    "insert": INSERT,
    "update": b"U" + OID + b"N\0\x02t\0\0\0\x011u",
    "update_key": b"U" + OID + b"K\0\x01t\0\0\0\x011N\0\x01t\0\0\0\x012",
    "update_old": b"U" + OID + b"O\0\x01nN\0\x01t\0\0\0\x012",
    "delete_key": b"D" + OID + b"K\0\x01t\0\0\0\x011",
    "delete_old": b"D" + OID + b"O\0\x01t\0\0\0\x011",
    "truncate": b"T\0\0\0\x02\x03" + OID + XID,
    "message": b"M\x01" + LSN + b"flash\0\0\0\0\x02hi",
    "stream_start": b"S" + XID + b"\x01",
    "stream_stop": b"E",
    "stream_commit": b"c" + XID + b"\0" + LSN + LSN + AT,
    "stream_abort": b"A" + XID + XID,
}
