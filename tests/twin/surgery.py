"""Operations on rows: appended, kept, reset."""
