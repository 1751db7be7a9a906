//! The freestanding programs that images and engines are made of, as bytes.
