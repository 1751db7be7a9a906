//! Linux error numbers, as the kernel's one error type.

use core::fmt;

/// A Linux error number (`errno(3)`), always positive.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Errno(u16);

/// What most of the kernel returns.
pub type Result<T, E = Errno> = core::result::Result<T, E>;

macro_rules! errnos {
    ($($name:ident)*) => {
        impl Errno {
            $(
                #[doc = concat!("`", stringify!($name), "`.")]
                pub const $name: Errno = Errno(linux_raw_sys::errno::$name as u16);
            )*
        }

        impl fmt::Debug for Errno {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                match *self {
                    $(Errno::$name => formatter.write_str(stringify!($name)),)*
                    Errno(number) => write!(formatter, "errno {number}"),
                }
            }
        }
    };
}

errnos! {
    EPERM ENOENT ESRCH EINTR EIO ENXIO E2BIG ENOEXEC EBADF ECHILD EAGAIN ENOMEM EACCES EFAULT ENOTBLK EBUSY EEXIST EXDEV
    ENODEV ENOTDIR EISDIR EINVAL ENFILE EMFILE ENOTTY ETXTBSY EFBIG ENOSPC ESPIPE EROFS EMLINK EPIPE EDOM ERANGE EDEADLK
    ENAMETOOLONG ENOLCK ENOSYS ENOTEMPTY ELOOP ENODATA ETIME EOVERFLOW EBADFD EILSEQ EUSERS ENOTSOCK EDESTADDRREQ
    EMSGSIZE EPROTOTYPE ENOPROTOOPT EPROTONOSUPPORT ESOCKTNOSUPPORT EOPNOTSUPP EPFNOSUPPORT EAFNOSUPPORT EADDRINUSE
    EADDRNOTAVAIL ENETDOWN ENETUNREACH ENETRESET ECONNABORTED ECONNRESET ENOBUFS EISCONN ENOTCONN ESHUTDOWN
    ETIMEDOUT ECONNREFUSED EHOSTDOWN EHOSTUNREACH EALREADY EINPROGRESS ESTALE EPROTO ECANCELED EOWNERDEAD
    ENOTRECOVERABLE
}

impl Errno {
    /// From a number that came from outside (the monitor, a FUSE server, a shim); what is not an error number
    /// becomes `EIO`.
    #[must_use]
    pub fn from_number(number: i64) -> Errno {
        match u16::try_from(number) {
            Ok(number @ 1..=4095) => Errno(number),
            _ => Errno::EIO,
        }
    }

    /// The positive number.
    #[must_use]
    pub fn number(self) -> i32 {
        i32::from(self.0)
    }

    /// From a return value of the host interface: zero or positive is a value, negative an error number.
    ///
    /// # Errors
    /// The error that the value stands for.
    pub fn check(value: isize) -> Result<usize> {
        usize::try_from(value).map_err(|_| Errno::from_number(-(value as i64)))
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, formatter)
    }
}

impl core::error::Error for Errno {}
