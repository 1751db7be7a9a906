//! The command line as types.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// Runs a program as a unikernel, in one command.
#[derive(Debug, Parser)]
#[command(
    name = "kiln",
    version,
    propagate_version = true,
    disable_help_subcommand = true,
    max_term_width = 100
)]
#[command(after_help = "Begin with:  kiln run -p 8080:80 DIRECTORY-WITH-INDEX-HTML")]
pub struct Arguments {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a program, a site or an image as a unikernel
    Run(Box<RunArguments>),
    /// Build an image
    Build(BuildArguments),
    /// List instances
    #[command(visible_alias = "list")]
    Ps(PsArguments),
    /// Show what an instance wrote
    Logs(LogsArguments),
    /// Stop instances: SIGTERM, and an end after the grace period
    Stop(StopArguments),
    /// End instances at once, or send their programs a signal
    Kill(KillArguments),
    /// Remove instances that have ended
    Rm(RmArguments),
    /// List stored images
    Images(JsonArguments),
    /// Remove stored images
    Rmi(RmiArguments),
    /// Show everything about an instance or an image
    Inspect(InspectArguments),
    /// Say what will not work, before running it
    Check(CheckArguments),
    /// Keep directories for programs' data
    Volume(VolumeArguments),
    /// Start unikernels when somebody asks for them by name, and stop them when nobody does
    Summon(Box<SummonArguments>),
    /// Show versions, and which engines this machine has
    Version(JsonArguments),
    /// The monitor of an instance in the background
    #[command(name = "instance-monitor", hide = true)]
    Monitor(MonitorArguments),
}

/// `--engine`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum EngineName {
    /// A confined process of this machine
    Process,
    /// A virtual machine in QEMU
    Qemu,
    /// A virtual machine on this machine's processor
    Kvm,
}

impl EngineName {
    /// The engine's own name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Process => "process",
            Self::Qemu => "qemu",
            Self::Kvm => "kvm",
        }
    }
}

/// `--net`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum NetworkName {
    /// The host's sockets, handed over one by one (process only; default there)
    Socket,
    /// The unikernel's own TCP/IP (default in virtual machines)
    Direct,
    /// Loopback only
    None,
}

/// `kiln run`.
#[derive(Args, Debug)]
pub struct RunArguments {
    /// Run in the background and print the instance's name
    #[arg(short, long)]
    pub detach: bool,
    /// Name of the instance
    #[arg(long)]
    pub name: Option<String>,
    /// Host name that the program sees [default: the instance's name]
    #[arg(long)]
    pub hostname: Option<String>,
    /// Memory of the unikernel, such as 64M [default: the image's]
    #[arg(short, long, value_name = "SIZE")]
    pub memory: Option<String>,
    /// Set an environment variable, or pass on your own
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub env: Vec<String>,
    /// Working directory of the program
    #[arg(short, long, value_name = "PATH")]
    pub workdir: Option<String>,
    /// Numeric user of the program
    #[arg(short, long, value_name = "UID[:GID]")]
    pub user: Option<String>,
    /// Publish a port of the program on this machine; HOST 0 picks a free one
    #[arg(short, long, value_name = "[ADDRESS:]HOST:GUEST[/udp]")]
    pub publish: Vec<String>,
    /// Give the program a directory of this machine, or a volume by name
    #[arg(short, long, value_name = "HOSTDIR:PATH[:ro]")]
    pub volume: Vec<String>,
    /// How the program reaches the network
    #[arg(long, value_enum)]
    pub net: Option<NetworkName>,
    /// With --net direct: own address instead of one by DHCP; may be given for IPv4 and IPv6
    #[arg(long, value_name = "ADDRESS/LENGTH")]
    pub ip: Vec<String>,
    /// With --ip: default gateway; may be given for IPv4 and IPv6
    #[arg(long, value_name = "ADDRESS", requires = "ip")]
    pub gateway: Vec<std::net::IpAddr>,
    /// What runs the image [default: the best that this machine has]
    #[arg(long, value_enum)]
    pub engine: Option<EngineName>,
    /// Remove the instance when it ends (default in the foreground without --name)
    #[arg(long)]
    pub rm: bool,
    /// Give standard input to the program; without, it reads the end of a file
    #[arg(short, long, conflicts_with = "detach")]
    pub interactive: bool,
    /// What the kernel logs, such as syscall=trace,net=debug
    #[arg(long, value_name = "FILTER")]
    pub log: Option<String>,
    /// Add a file or directory to the image that is built from SOURCE
    #[arg(long, value_name = "PATH[:PATH]")]
    pub include: Vec<String>,
    /// Leave system call instructions as they are: each then costs a trap
    #[arg(long)]
    pub no_rewrite: bool,
    /// A program, a directory with kiln.toml or index.html, an image file, or a stored image's name
    #[arg(value_name = "SOURCE|IMAGE")]
    pub source: PathBuf,
    /// Arguments for the program, replacing the image's
    #[arg(last = true, value_name = "ARGUMENT")]
    pub arguments: Vec<String>,
}

/// `kiln build`.
#[derive(Args, Debug)]
pub struct BuildArguments {
    /// Write the image to a file instead of the store
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Name of the image [default: the source's]
    #[arg(long)]
    pub name: Option<String>,
    /// Add a file or directory
    #[arg(long, value_name = "PATH[:PATH]")]
    pub include: Vec<String>,
    /// Leave system call instructions as they are: each then costs a trap
    #[arg(long)]
    pub no_rewrite: bool,
    /// A program, or a directory with kiln.toml or index.html
    pub source: PathBuf,
}

/// `kiln ps`.
#[derive(Args, Debug)]
pub struct PsArguments {
    /// Only instances that have not ended
    #[arg(short, long)]
    pub running: bool,
    /// All instances, also ended ones: what is shown without options
    #[arg(short, long, hide = true)]
    pub all: bool,
    /// Only names
    #[arg(short, long, conflicts_with = "json")]
    pub quiet: bool,
    /// For machines
    #[arg(long)]
    pub json: bool,
}

/// Commands whose only option is `--json`.
#[derive(Args, Debug)]
pub struct JsonArguments {
    /// For machines
    #[arg(long)]
    pub json: bool,
}

/// `kiln logs`.
#[derive(Args, Debug)]
pub struct LogsArguments {
    /// Go on until the instance ends
    #[arg(short, long)]
    pub follow: bool,
    /// Only the last lines
    #[arg(short = 'n', long, value_name = "LINES")]
    pub tail: Option<usize>,
    /// The instance
    pub name: String,
}

/// `kiln stop`.
#[derive(Args, Debug)]
pub struct StopArguments {
    /// Grace period before the end
    #[arg(short, long, value_name = "SECONDS", default_value_t = 10)]
    pub time: u32,
    /// The instances
    #[arg(required = true, value_name = "NAME")]
    pub names: Vec<String>,
}

/// `kiln kill`.
#[derive(Args, Debug)]
pub struct KillArguments {
    /// Signal by name or number; KILL ends the instance itself
    #[arg(short, long, default_value = "KILL")]
    pub signal: String,
    /// The instances
    #[arg(required = true, value_name = "NAME")]
    pub names: Vec<String>,
}

/// `kiln rm`.
#[derive(Args, Debug)]
pub struct RmArguments {
    /// End them first if they run
    #[arg(short, long)]
    pub force: bool,
    /// The instances
    #[arg(required = true, value_name = "NAME")]
    pub names: Vec<String>,
}

/// `kiln rmi`.
#[derive(Args, Debug)]
pub struct RmiArguments {
    /// The images: names or digests
    #[arg(required = true, value_name = "IMAGE")]
    pub images: Vec<String>,
}

/// `kiln inspect`.
#[derive(Args, Debug)]
pub struct InspectArguments {
    /// For machines (an instance is always shown as JSON)
    #[arg(long)]
    pub json: bool,
    /// An instance, an image file, or a stored image's name
    #[arg(value_name = "NAME|IMAGE")]
    pub target: String,
}

/// `kiln check`.
#[derive(Args, Debug)]
pub struct CheckArguments {
    /// For machines
    #[arg(long)]
    pub json: bool,
    /// Add a file or directory, as for `build`
    #[arg(long, value_name = "PATH[:PATH]")]
    pub include: Vec<String>,
    /// A program, or a directory with kiln.toml or index.html
    pub source: PathBuf,
}

/// `kiln volume`.
#[derive(Args, Debug)]
pub struct VolumeArguments {
    /// What to do.
    #[command(subcommand)]
    pub command: VolumeCommand,
}

/// The verbs of `kiln volume`.
#[derive(Debug, Subcommand)]
pub enum VolumeCommand {
    /// List volumes
    Ls(JsonArguments),
    /// Make a volume
    Create {
        /// Its name
        name: String,
    },
    /// Remove volumes with all their files
    Rm {
        /// Their names
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
    },
}

/// `kiln summon`.
#[derive(Args, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub struct SummonArguments {
    /// About a summoner that is at work.
    #[command(subcommand)]
    pub command: Option<SummonCommand>,
    /// To be one.
    #[command(flatten)]
    pub serve: ServeArguments,
}

/// `kiln summon [CONFIG]`.
#[derive(Args, Debug)]
pub struct ServeArguments {
    /// What to summon [default: ./summon.toml, unless there is a --unit]
    #[arg(value_name = "CONFIG")]
    pub configuration: Option<PathBuf>,
    /// Work in the background
    #[arg(short, long)]
    pub detach: bool,
    /// Check the configuration and the sources, and do nothing
    #[arg(long, conflicts_with = "detach")]
    pub check: bool,
    /// One more unit, such as dns=www.example.org,image=site.kiln,port=80
    #[arg(short, long, value_name = "KEY=VALUE,...")]
    pub unit: Vec<String>,
    /// Where the name server listens [default: 127.0.0.1:53]
    #[arg(short, long, value_name = "ADDRESS:PORT")]
    pub listen: Vec<String>,
    /// Who is asked about other names: a name server, system or none [default: system]
    #[arg(long, value_name = "ADDRESS")]
    pub forward: Vec<String>,
    /// Whose questions about other names are passed on [default: this machine's loopback]
    #[arg(long, value_name = "NETWORK")]
    pub forward_for: Vec<String>,
    /// Names below this one that no unit has do not exist
    #[arg(long, value_name = "DOMAIN")]
    pub zone: Vec<String>,
    /// How long answers may be kept, in seconds [default: 60]
    #[arg(long, value_name = "SECONDS")]
    pub ttl: Option<String>,
    /// Where units get their addresses from [default: 127.78.0.0/16]
    #[arg(long, value_name = "NETWORK")]
    pub pool: Option<String>,
    /// Where units get IPv6 addresses from
    #[arg(long, value_name = "NETWORK")]
    pub pool6: Option<String>,
    /// Add the units' addresses to this interface, such as a bridge
    #[arg(long, value_name = "NAME")]
    pub interface: Option<String>,
    /// Serve numbers for Prometheus here
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub metrics: Option<String>,
    /// Most units that run at once
    #[arg(long, value_name = "NUMBER")]
    pub max_running: Option<String>,
    /// Most memory of all running units
    #[arg(long, value_name = "SIZE")]
    pub max_memory: Option<String>,
    /// How the log is written
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
    /// What is logged: error, warn, info or debug
    #[arg(long, default_value = "info")]
    pub log_level: String,
    /// In the background: tell the command that waits, on standard output
    #[arg(long, hide = true)]
    pub detached: bool,
}

/// `--log-format`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people
    Text,
    /// A JSON object a line
    Json,
}

/// The verbs of `kiln summon`.
#[derive(Debug, Subcommand)]
pub enum SummonCommand {
    /// List units: whether they run, who asked, how fast they came
    Ps {
        /// For machines
        #[arg(long)]
        json: bool,
        /// Again every second
        #[arg(short, long)]
        watch: bool,
    },
    /// Start units now
    Start {
        /// The units
        #[arg(required = true, value_name = "UNIT")]
        names: Vec<String>,
    },
    /// Stop units now; the next query starts them again
    Stop {
        /// The units
        #[arg(required = true, value_name = "UNIT")]
        names: Vec<String>,
    },
    /// Add a unit, which stays until it is removed
    Add {
        /// Such as dns=www.example.org,image=site.kiln,port=80
        #[arg(value_name = "KEY=VALUE,...")]
        unit: String,
    },
    /// Remove units that were added
    Rm {
        /// The units
        #[arg(required = true, value_name = "UNIT")]
        names: Vec<String>,
    },
    /// Read the configuration again
    Reload,
    /// Show the last summons of a unit, step by step
    Trace {
        /// All that are kept
        #[arg(short, long)]
        all: bool,
        /// For machines
        #[arg(long)]
        json: bool,
        /// Write a trace file for Perfetto or chrome://tracing
        #[arg(short, long, value_name = "FILE")]
        output: Option<PathBuf>,
        /// The unit
        #[arg(value_name = "UNIT")]
        name: String,
    },
    /// End the summoner and its units
    Down {
        /// Leave the units running for the next summoner
        #[arg(long)]
        keep: bool,
    },
}

/// The hidden command that a run in the background starts.
#[derive(Args, Debug)]
pub struct MonitorArguments {
    /// The state directory
    pub state: PathBuf,
    /// The instance
    pub name: String,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn programs_get_their_arguments_and_options_may_follow_the_source() {
        let line = [
            "kiln", "run", "prog", "-p", "1:2", "--", "-d", "--name", "x",
        ];
        let Command::Run(run) = Arguments::try_parse_from(line).unwrap().command else {
            panic!("not a run");
        };
        assert!(!run.detach && run.name.is_none());
        assert_eq!(run.arguments, ["-d", "--name", "x"]);
        assert_eq!(run.publish, ["1:2"]);
    }
}
