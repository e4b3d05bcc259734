/* crowd - many browsers that come back at once, WINDOW handshakes at a time: each asks for TARGET
 * and reads until BYTES have come behind its 101, or never reads (BYTES 0). Prints the seconds
 * until all have everything.
 * gcc -O2 -o crowd crowd.c ; ./crowd PORT BROWSERS BYTES TARGET   (loopback only) */
#define _GNU_SOURCE
#define WINDOW 128
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

struct browser { int is_open; long got; };

static struct browser browsers[200000];
static char buffer[1 << 18];

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static void come(int number, int port, int ep)
{
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), one = 1;
    struct sockaddr_in from = {.sin_family = AF_INET,
                               .sin_addr.s_addr = htonl(INADDR_LOOPBACK + 1 + number % 16)};
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port),
                             .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct epoll_event ev = {.events = EPOLLOUT, .data.fd = fd};
    if (fd < 0) die("socket");
    setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof one);
    if (bind(fd, (void *)&from, sizeof from)) die("bind");
    connect(fd, (void *)&to, sizeof to);
    epoll_ctl(ep, EPOLL_CTL_ADD, fd, &ev);
}

int main(int argc, char **argv)
{
    if (argc != 5) { fprintf(stderr, "crowd PORT BROWSERS BYTES TARGET\n"); return 1; }
    int port = atoi(argv[1]), count = atoi(argv[2]), ep = epoll_create1(0), left = count;
    long wanted = atol(argv[3]);
    char request[1024];
    int size = snprintf(request, sizeof request,
        "GET %s HTTP/1.1\r\nHost: crowd\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n",
        argv[4]);
    double start = now();
    int come_so_far = 0;
    while (come_so_far < count && come_so_far < WINDOW) come(come_so_far++, port, ep);
    struct epoll_event evs[256];
    while (left > 0) {
        int n = epoll_wait(ep, evs, 256, 60000);
        if (n == 0) { fprintf(stderr, "%d browsers still wait\n", left); return 1; }
        for (int i = 0; i < n; i++) {
            int fd = evs[i].data.fd;
            struct browser *b = &browsers[fd];
            if (!b->is_open) {
                struct epoll_event ev = {.events = EPOLLIN, .data.fd = fd};
                if (send(fd, request, size, MSG_NOSIGNAL) != size) die("send");
                b->is_open = 1;
                b->got = -1;
                epoll_ctl(ep, EPOLL_CTL_MOD, fd, &ev);
                continue;
            }
            ssize_t r = recv(fd, buffer, b->got < 0 ? 4096 : sizeof buffer, 0);
            if (r <= 0) die("a browser was hung up on");
            if (b->got < 0) {
                char *end = memmem(buffer, r, "\r\n\r\n", 4);
                if (!end || memcmp(buffer, "HTTP/1.1 101", 12)) die("no 101");
                b->got = r - (end + 4 - buffer);
                if (come_so_far < count) come(come_so_far++, port, ep);
                if (!wanted) { left--; epoll_ctl(ep, EPOLL_CTL_DEL, fd, NULL); }
            } else {
                b->got += r;
            }
            if (wanted && b->got >= wanted) {
                left--;
                epoll_ctl(ep, EPOLL_CTL_DEL, fd, NULL); /* it stays connected */
            }
        }
    }
    printf("%f\n", now() - start);
    fflush(stdout);
    getchar(); /* until standard input ends */
    return 0;
}
