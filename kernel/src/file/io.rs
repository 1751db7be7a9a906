//! The two ends of a copy between a file and memory.
//!
//! A [`Sink`] is where `read` puts bytes, a [`Source`] is where `write` takes them. Both are lists of memory segments:
//! of the program (checked against its address range; a fault while copying gives `EFAULT`), or of the kernel itself
//! (`sendfile`, tests). Both remember how far they have got, so one may be filled by several calls.

#![allow(unsafe_code)]

use core::marker::PhantomData;

use alloc::vec::Vec;
use kiln_abi::host::Slice;

use crate::{
    Errno, Result,
    memory::user::{self, UserRange},
};

/// Most segments in a list: Linux's `UIO_MAXIOV`.
pub const MAX_SEGMENTS: usize = 1024;

/// Most bytes in one transfer: Linux's `MAX_RW_COUNT`.
pub const MAX_TRANSFER: usize = 0x7fff_f000;

enum Segments {
    One(Slice),
    Many(Vec<Slice>),
}

/// A list of segments with a position.
struct Cursor {
    segments: Segments,
    /// Index of the current segment.
    index: usize,
    /// Bytes done in the current segment.
    offset: usize,
    /// Bytes left in all.
    remaining: usize,
}

impl Cursor {
    fn one(slice: Slice) -> Cursor {
        let length = slice.length.min(MAX_TRANSFER);
        Cursor {
            segments: Segments::One(Slice { length, ..slice }),
            index: 0,
            offset: 0,
            remaining: length,
        }
    }

    fn many(ranges: &[UserRange]) -> Result<Cursor> {
        if ranges.len() > MAX_SEGMENTS {
            return Err(Errno::EINVAL);
        }
        let mut remaining: usize = 0;
        let mut segments = Vec::with_capacity(ranges.len());
        for range in ranges {
            let length = range.length.min(MAX_TRANSFER - remaining);
            remaining += length;
            segments.push(Slice {
                address: range.address,
                length,
            });
        }
        Ok(Cursor {
            segments: Segments::Many(segments),
            index: 0,
            offset: 0,
            remaining,
        })
    }

    fn slices(&self) -> &[Slice] {
        match &self.segments {
            Segments::One(slice) => core::slice::from_ref(slice),
            Segments::Many(slices) => slices,
        }
    }

    /// What is left of the current segment, skipping empty ones.
    fn current(&mut self) -> Option<Slice> {
        while let Some(slice) = self.slices().get(self.index).copied() {
            if self.offset < slice.length {
                return Some(Slice {
                    address: slice.address + self.offset,
                    length: slice.length - self.offset,
                });
            }
            self.index += 1;
            self.offset = 0;
        }
        None
    }

    fn advance(&mut self, mut count: usize) {
        count = count.min(self.remaining);
        self.remaining -= count;
        while count > 0 {
            let Some(slice) = self.current() else { return };
            let step = slice.length.min(count);
            self.offset += step;
            count -= step;
        }
    }

    /// Gives the remaining segments to `use_them`, without allocating where they lie in one piece or whole.
    fn with_remaining<R>(&mut self, use_them: impl FnOnce(&[Slice]) -> R) -> R {
        let Some(first) = self.current() else {
            return use_them(&[]);
        };
        let rest = self.slices().get(self.index..).unwrap_or_default();
        if rest.len() == 1 {
            return use_them(&[first]);
        }
        if self.offset == 0 {
            return use_them(rest);
        }
        use_them(&self.remaining_slices())
    }

    /// The remaining segments, for handing to the host as they are.
    fn remaining_slices(&mut self) -> Vec<Slice> {
        let Some(first) = self.current() else {
            return Vec::new();
        };
        let mut slices = Vec::with_capacity(self.slices().len() - self.index);
        slices.push(first);
        slices.extend(self.slices().iter().skip(self.index + 1));
        slices
    }
}

/// Where a read puts bytes.
pub struct Sink<'a> {
    cursor: Cursor,
    lifetime: PhantomData<&'a mut [u8]>,
}

/// Where a write takes bytes.
pub struct Source<'a> {
    cursor: Cursor,
    lifetime: PhantomData<&'a [u8]>,
}

impl<'a> Sink<'a> {
    /// A range of program memory.
    #[must_use]
    pub fn user(range: UserRange) -> Sink<'static> {
        Sink {
            cursor: Cursor::one(Slice {
                address: range.address,
                length: range.length,
            }),
            lifetime: PhantomData,
        }
    }

    /// Several ranges of program memory (`readv`).
    ///
    /// # Errors
    /// `EINVAL` for more than [`MAX_SEGMENTS`].
    pub fn user_vector(ranges: &[UserRange]) -> Result<Sink<'static>> {
        Ok(Sink {
            cursor: Cursor::many(ranges)?,
            lifetime: PhantomData,
        })
    }

    /// Memory of the kernel.
    pub fn kernel(bytes: &'a mut [u8]) -> Sink<'a> {
        Sink {
            cursor: Cursor::one(Slice {
                address: bytes.as_mut_ptr() as usize,
                length: bytes.len(),
            }),
            lifetime: PhantomData,
        }
    }

    /// Bytes that still fit.
    #[must_use]
    pub fn remaining(&self) -> usize {
        self.cursor.remaining
    }

    /// Puts bytes in; returns how many fitted.
    ///
    /// # Errors
    /// `EFAULT` when not even one byte could be stored.
    pub fn put(&mut self, bytes: &[u8]) -> Result<usize> {
        let mut done = 0;
        while done < bytes.len() {
            let Some(slice) = self.cursor.current() else {
                break;
            };
            let step = slice.length.min(bytes.len() - done);
            // SAFETY: the segment was checked to be program memory, or is borrowed from the kernel for 'a.
            let left =
                unsafe { user::copy_raw(slice.address as *mut u8, bytes[done..].as_ptr(), step) };
            self.cursor.advance(step - left);
            done += step - left;
            if left > 0 {
                return if done > 0 {
                    Ok(done)
                } else {
                    Err(Errno::EFAULT)
                };
            }
        }
        Ok(done)
    }

    /// Puts `count` zero bytes in, or as many as fit.
    ///
    /// # Errors
    /// `EFAULT` when not even one byte could be stored.
    pub fn put_zeros(&mut self, count: usize) -> Result<usize> {
        const ZEROS: [u8; 512] = [0; 512];
        let count = count.min(self.remaining());
        let mut done = 0;
        while done < count {
            let step = ZEROS.len().min(count - done);
            match self.put(&ZEROS[..step]) {
                Ok(0) => break,
                Ok(stored) => done += stored,
                Err(error) if done == 0 => return Err(error),
                Err(_) => break,
            }
        }
        Ok(done)
    }

    /// The segments that are left, to be filled by the host; call [`Sink::advance`] afterwards.
    pub fn segments(&mut self) -> Vec<Slice> {
        self.cursor.remaining_slices()
    }

    /// Gives the segments that are left, in order, to a call of the host; [`Sink::advance`] counts what it has done.
    pub fn with_segments<R>(&mut self, use_them: impl FnOnce(&[Slice]) -> R) -> R {
        self.cursor.with_remaining(use_them)
    }

    /// Counts bytes that the host has stored.
    pub fn advance(&mut self, count: usize) {
        self.cursor.advance(count);
    }
}

impl<'a> Source<'a> {
    /// A range of program memory.
    #[must_use]
    pub fn user(range: UserRange) -> Source<'static> {
        Source {
            cursor: Cursor::one(Slice {
                address: range.address,
                length: range.length,
            }),
            lifetime: PhantomData,
        }
    }

    /// Several ranges of program memory (`writev`).
    ///
    /// # Errors
    /// `EINVAL` for more than [`MAX_SEGMENTS`].
    pub fn user_vector(ranges: &[UserRange]) -> Result<Source<'static>> {
        Ok(Source {
            cursor: Cursor::many(ranges)?,
            lifetime: PhantomData,
        })
    }

    /// Memory of the kernel.
    #[must_use]
    pub fn kernel(bytes: &'a [u8]) -> Source<'a> {
        Source {
            cursor: Cursor::one(Slice {
                address: bytes.as_ptr() as usize,
                length: bytes.len(),
            }),
            lifetime: PhantomData,
        }
    }

    /// Bytes left to take.
    #[must_use]
    pub fn remaining(&self) -> usize {
        self.cursor.remaining
    }

    /// Takes bytes out into `bytes`; returns how many there were.
    ///
    /// # Errors
    /// `EFAULT` when not even one byte could be loaded.
    pub fn take(&mut self, bytes: &mut [u8]) -> Result<usize> {
        let mut done = 0;
        while done < bytes.len() {
            let Some(slice) = self.cursor.current() else {
                break;
            };
            let step = slice.length.min(bytes.len() - done);
            // SAFETY: the segment was checked to be program memory, or is borrowed from the kernel for 'a.
            let left = unsafe {
                user::copy_raw(bytes[done..].as_mut_ptr(), slice.address as *const u8, step)
            };
            self.cursor.advance(step - left);
            done += step - left;
            if left > 0 {
                return if done > 0 {
                    Ok(done)
                } else {
                    Err(Errno::EFAULT)
                };
            }
        }
        Ok(done)
    }

    /// Takes everything that is left, at most `limit` bytes, into a new vector.
    ///
    /// # Errors
    /// `EFAULT` when not even one byte could be loaded.
    pub fn take_vector(&mut self, limit: usize) -> Result<Vec<u8>> {
        let mut bytes = alloc::vec![0; self.remaining().min(limit)];
        let count = self.take(&mut bytes)?;
        bytes.truncate(count);
        Ok(bytes)
    }

    /// The segments that are left, to be taken by the host; call [`Source::advance`] afterwards.
    pub fn segments(&mut self) -> Vec<Slice> {
        self.cursor.remaining_slices()
    }

    /// Gives the segments that are left, in order, to a call of the host; [`Source::advance`] counts what it has done.
    pub fn with_segments<R>(&mut self, use_them: impl FnOnce(&[Slice]) -> R) -> R {
        self.cursor.with_remaining(use_them)
    }

    /// Counts bytes that the host has taken.
    pub fn advance(&mut self, count: usize) {
        self.cursor.advance(count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_through_kernel_memory_and_counts() {
        let mut memory = [0u8; 8];
        let mut sink = Sink::kernel(&mut memory);
        assert_eq!(sink.put(b"abc"), Ok(3));
        assert_eq!(sink.put(b"defghijk"), Ok(5));
        assert_eq!(sink.remaining(), 0);
        assert_eq!(sink.put(b"x"), Ok(0));
        assert_eq!(&memory, b"abcdefgh");

        let mut source = Source::kernel(&memory);
        let mut part = [0; 5];
        assert_eq!(source.take(&mut part), Ok(5));
        assert_eq!(source.take_vector(100).unwrap(), b"fgh");
    }
}
