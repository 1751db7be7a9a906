/* Options of sockets: the values before and after they are set, and wrong ones. */
#include "check.h"
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/ioctl.h>
#include <net/if.h>
#include <sys/socket.h>

static int fd;

static void show(const char *name, int level, int option) {
    int value = -12345;
    socklen_t size = sizeof value;
    int result = getsockopt(fd, level, option, &value, &size);
    if (result)
        printf("%s: %s\n", name, error_name(errno));
    else
        printf("%s = %d (%u bytes)\n", name, value, size);
}
#define GET(level, option) show(#option, level, option)

static void set(const char *name, int level, int option, int value) {
    int result = setsockopt(fd, level, option, &value, sizeof value);
    printf("set %s to %d: %s\n", name, value, result ? error_name(errno) : "done");
    show(name, level, option);
}
#define SET(level, option, value) set(#option, level, option, value)

static void common(void) {
    GET(SOL_SOCKET, SO_TYPE);
    GET(SOL_SOCKET, SO_DOMAIN);
    GET(SOL_SOCKET, SO_PROTOCOL);
    GET(SOL_SOCKET, SO_ERROR);
    GET(SOL_SOCKET, SO_ACCEPTCONN);
    SET(SOL_SOCKET, SO_REUSEADDR, 1);
    SET(SOL_SOCKET, SO_REUSEADDR, 0);
    SET(SOL_SOCKET, SO_REUSEPORT, 1);
    SET(SOL_SOCKET, SO_KEEPALIVE, 1);
    SET(SOL_SOCKET, SO_BROADCAST, 1);
    SET(SOL_SOCKET, SO_SNDBUF, 20000);
    SET(SOL_SOCKET, SO_RCVBUF, 20000);
    int value = 1;
    CALL(setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &value, 1));
    CALL(setsockopt(fd, SOL_SOCKET, 9999, &value, sizeof value));
    CALL(setsockopt(fd, 9999, 1, &value, sizeof value));
    CALL(getsockopt(fd, SOL_SOCKET, 9999, &value, &(socklen_t){sizeof value}));
    CALL(getsockopt(fd, SOL_SOCKET, SO_TYPE, &value, NULL));
    CALL(setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, (void *)8, sizeof value));
    struct linger linger;
    socklen_t size = sizeof linger;
    CALL(getsockopt(fd, SOL_SOCKET, SO_LINGER, &linger, &size));
    SHOW(linger.l_onoff);
    linger = (struct linger){1, 5};
    CALL(setsockopt(fd, SOL_SOCKET, SO_LINGER, &linger, sizeof linger));
    linger.l_linger = 0;
    CALL(getsockopt(fd, SOL_SOCKET, SO_LINGER, &linger, &size));
    SHOW(linger.l_linger);
    struct timeval time = {3, 0};
    CALL(setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &time, sizeof time));
    time.tv_sec = 0;
    size = sizeof time;
    CALL(getsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &time, &size));
    SHOW(time.tv_sec);
    CALL(getsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &time, &size));
    SHOW(time.tv_sec);
}

int main(void) {
    section("TCP");
    fd = MUST(socket(AF_INET, SOCK_STREAM, 0));
    common();
    GET(IPPROTO_TCP, TCP_NODELAY);
    SET(IPPROTO_TCP, TCP_NODELAY, 1);
    SET(IPPROTO_TCP, TCP_CORK, 1);
    SET(IPPROTO_TCP, TCP_KEEPIDLE, 60);
    SET(IPPROTO_TCP, TCP_KEEPINTVL, 10);
    SET(IPPROTO_TCP, TCP_KEEPCNT, 3);
    SET(IPPROTO_TCP, TCP_KEEPIDLE, 0);
    SET(IPPROTO_TCP, TCP_USER_TIMEOUT, 5000);
    SET(IPPROTO_TCP, TCP_DEFER_ACCEPT, 1);
    SET(IPPROTO_TCP, TCP_QUICKACK, 1);
    SET(IPPROTO_IP, IP_TTL, 32);
    SET(IPPROTO_IP, IP_TOS, 0x10);
    struct tcp_info info;
    socklen_t size = sizeof info;
    CALL(getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &size));
    SHOW(info.tcpi_state);
    struct sockaddr_in any = {.sin_family = AF_INET};
    MUST(bind(fd, (void *)&any, sizeof any));
    MUST(listen(fd, 1));
    GET(SOL_SOCKET, SO_ACCEPTCONN);
    SET(SOL_SOCKET, SO_REUSEPORT, 0);
    int on = 1;
    CALL(ioctl(fd, FIONBIO, &on));
    CALL(accept(fd, NULL, NULL));
    CALL(ioctl(fd, 0x1234, &on));
    close(fd);

    section("TCP over IPv6");
    fd = MUST(socket(AF_INET6, SOCK_STREAM, 0));
    SET(IPPROTO_IPV6, IPV6_V6ONLY, 1);
    SET(IPPROTO_TCP, TCP_NODELAY, 1);
    SET(IPPROTO_IPV6, IPV6_UNICAST_HOPS, 12);
    close(fd);

    section("UDP");
    fd = MUST(socket(AF_INET, SOCK_DGRAM, 0));
    common();
    GET(IPPROTO_TCP, TCP_NODELAY);
    SET(IPPROTO_IP, IP_PKTINFO, 1);
    SET(IPPROTO_IP, IP_MULTICAST_TTL, 4);
    SET(IPPROTO_IP, IP_MULTICAST_LOOP, 0);
    close(fd);

    section("not sockets");
    int pipes[2];
    MUST(pipe(pipes));
    fd = pipes[0];
    GET(SOL_SOCKET, SO_TYPE);
    fd = 99;
    GET(SOL_SOCKET, SO_TYPE);

    section("interfaces");
    SHOW(if_nametoindex("lo"));
    char name[IF_NAMESIZE] = "";
    SHOW(if_indextoname(1, name) != NULL);
    printf("%s\n", name);
    CALL(if_nametoindex("none0") ? 0 : -1);
    return finish();
}
