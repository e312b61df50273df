"""Text in, token batches out: read documents, tokenise them with a cache, pack them into rows."""

from cogsym.data.formats import read_records
from cogsym.data.packing import PackedDataset, pack
from cogsym.data.sources import Document, Loss, Source, content_digest, read_documents
from cogsym.data.tokens import TokenizedDocuments, held_out, separator_id, tokenize

__all__ = [
    "Document",
    "Loss",
    "PackedDataset",
    "Source",
    "TokenizedDocuments",
    "content_digest",
    "held_out",
    "pack",
    "read_documents",
    "read_records",
    "separator_id",
    "tokenize",
]
